//! The whole controller: a host over vfio-user, its function in a session loop, queues on reactors.

#![cfg(not(loom))]

mod rig;

mod ends;
mod ordinary;
