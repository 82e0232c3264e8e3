//! Faults of the parts and of what connects them, while runs are under way. After each, what [`load`] checks must
//! hold: every run that a client was told of ended once, and the accounts are right.

mod clock;
mod cluster;
mod database;
mod disk;
mod kills;
mod load;
mod network;
mod redis;
mod rolling;
mod stops;
