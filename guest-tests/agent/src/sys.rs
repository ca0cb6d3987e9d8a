//! The system calls that the standard library does not wrap.
#![allow(unsafe_code)] // thin wrappers around libc; no pointer outlives its call

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Mounts a file system without options.
pub fn mount(source: &str, target: &str, kind: &str) -> io::Result<()> {
    let [source, target, kind] = [source, target, kind]
        .map(|text| CString::new(text).expect("a constant without a zero byte"));
    // SAFETY: three strings that end in zero and live until the call returns; no data argument.
    check(unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            0,
            std::ptr::null(),
        )
    })
}

/// Loads an unpacked module.
pub fn load_module(file: &File) -> io::Result<()> {
    // SAFETY: a descriptor that is open, an empty string of parameters, no flags.
    let result =
        unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    check(result as libc::c_int)
}

/// Waits for any child and names it; nothing when there is none left.
pub fn wait_any() -> Option<u32> {
    loop {
        // SAFETY: no status is asked for.
        let pid = unsafe { libc::waitpid(-1, std::ptr::null_mut(), 0) };
        if pid > 0 {
            return Some(pid as u32);
        }
        if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return None;
        }
    }
}

/// Ends the machine.
pub fn power_off() -> ! {
    // SAFETY: plain calls; the process may, as PID 1 of its machine.
    unsafe {
        libc::sync();
        libc::reboot(libc::RB_POWER_OFF);
    }
    unreachable!("the kernel was told to power off");
}

/// Turns a serial line into a plain stream of bytes.
pub fn make_raw(file: &File) -> io::Result<()> {
    // SAFETY: `termios` is plain data for which zeroes are valid; the descriptor is open.
    unsafe {
        let mut settings: libc::termios = std::mem::zeroed();
        check(libc::tcgetattr(file.as_raw_fd(), &mut settings))?;
        libc::cfmakeraw(&mut settings);
        check(libc::tcsetattr(file.as_raw_fd(), libc::TCSANOW, &settings))
    }
}

/// A descriptor that is readable once this child of ours, not yet waited for, has ended.
pub fn pidfd(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: numbers only.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Makes reads of a pipe return instead of waiting.
pub fn set_nonblocking(fd: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: an open descriptor; a pipe's other flags at our end are not of interest.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) })
}

/// Waits until one of these is readable or closed. A negative descriptor is passed over.
pub fn poll(fds: &mut [libc::pollfd]) -> io::Result<()> {
    loop {
        // SAFETY: the slice is valid for its length during the call.
        if unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) } >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Sends a signal to a process group.
pub fn kill_group(group: u32, signal: i32) {
    // SAFETY: numbers only. A group that is gone is no error to the caller.
    unsafe { libc::kill(-(group as libc::pid_t), signal) };
}
