//! What a guest sees: cases and their framework
