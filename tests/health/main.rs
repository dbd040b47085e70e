//! Health checks against real servers: plain sockets that misbehave in every way, nginx, HAProxy,
//! Dante, the kernel's echo, and programs.

mod checks;
mod dante;
mod echo;
mod script;
mod servers;
mod sockets;
mod support;
