//! The vhost-user attachment: sessions with front ends
