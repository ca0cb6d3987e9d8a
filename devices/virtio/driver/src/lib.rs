//! Virtqueues as a driver sees them, for tests and benchmarks
