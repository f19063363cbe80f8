//! Simulation and process tests of Crema.
//!
//! `sim` drives whole clusters of the production core from one seed; `process` starts real `crema` processes, for the
//! benchmarks too; `history` is the form in which both hand what their clients saw to checkers.

#[cfg(test)]
mod cell_model;
pub mod check_cli;
pub mod faults_cli;
pub mod history;
pub mod kills_cli;
pub mod process;
#[cfg(test)]
mod schedules;
pub mod sim;

/// The examples of the README, compiled with the documentation tests so that they stay true.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
pub struct ReadmeExamples;
