//! x
/// x
pub const CONTROL_SOCKET: &str = "control.sock";
