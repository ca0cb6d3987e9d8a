//! bluffd, bluffctl and what they compose
