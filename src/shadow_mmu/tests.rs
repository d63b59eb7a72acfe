//! The shadow MMU without KVM, on the machine and against the model of [`super::reference`].

mod batches;
mod concurrent;
mod directed;
mod hardware;
mod neighbours;
mod overtaken;
mod random;
mod refused;
