//! Sessions, from outside: front ends of every kind, and a device that only records.

mod attacks;
mod front_ends;
mod functions;
mod killed;
mod orderly_end;
mod sequences;
mod support;
