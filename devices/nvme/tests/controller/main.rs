//! The whole controller: a host over vfio-user, its function in a session loop, queues on reactors.

#![cfg(not(loom))]

mod rig;

mod commands;
mod ends;
mod events;
mod formats;
mod health;
mod hostile;
mod namespaces;
mod ordinary;
mod pauses;
mod queues;
mod several;
mod slow;
mod whole;
