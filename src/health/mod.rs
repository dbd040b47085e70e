//! Health checks: the sans-IO rise/fall machine, the probes, and the tasks that run them.

pub mod machine;
