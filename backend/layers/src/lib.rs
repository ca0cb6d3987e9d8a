//! Layers around volumes: delay and fault
