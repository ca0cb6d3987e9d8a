//! Data-path threads: one epoll wait, one io_uring, adaptive polling, timers, messages
