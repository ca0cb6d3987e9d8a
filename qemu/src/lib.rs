//! QEMU as a library: host folder, images, command line, QMP, console
