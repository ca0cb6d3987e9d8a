//! Guest memory of the card: regions, epochs, and buffers that backends can name without knowing a device
