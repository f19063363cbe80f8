//! Simulation and process tests of Crema.
//!
//! `process` starts real `crema` processes; the benchmarks use it too.

pub mod process;

/// The examples of the README, compiled with the documentation tests so that they stay true.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
pub struct ReadmeExamples;
