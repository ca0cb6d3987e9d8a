//! The states of volumes, networks and functions, and which follows which.

use serde::{Deserialize, Serialize};

use crate::message::{NetworkInfo, SessionInfo, VolumeInfo};
use crate::spec::FunctionSpec;

/// A step that does not fit the state.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is {state}, where {step} is not possible")]
pub struct IllegalTransition {
    /// The state.
    pub state: &'static str,
    /// What was to happen.
    pub step: &'static str,
}

/// How a volume stands.
///
/// ```text
///   Opening --> Open --> Closing --> (gone)
///     ^ \         \         /
///     |  `---------`-> Failed
///     `-----------------'
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VolumeState {
    /// The data half was asked for it.
    Opening,
    /// It can be used.
    Open(VolumeInfo),
    /// The data half was asked to let go of it.
    Closing,
    /// It cannot be used.
    Failed {
        /// Why.
        reason: String,
    },
}

/// What happens to a volume.
#[derive(Clone, Debug)]
pub(super) enum VolumeStep {
    Opened(VolumeInfo),
    Resized(u64),
    Reopen,
    Close,
    Closed,
    Failed(String),
}

impl VolumeState {
    /// The state in one word.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Opening => "opening",
            Self::Open(_) => "open",
            Self::Closing => "closing",
            Self::Failed { .. } => "failed",
        }
    }

    pub(super) fn next(&self, step: VolumeStep) -> Result<Self, IllegalTransition> {
        match (self, step) {
            (Self::Opening, VolumeStep::Opened(info)) => Ok(Self::Open(info)),
            (Self::Open(info), VolumeStep::Resized(size)) => {
                Ok(Self::Open(VolumeInfo { size, ..*info }))
            }
            (Self::Failed { .. }, VolumeStep::Reopen) => Ok(Self::Opening),
            (Self::Open(_), VolumeStep::Close) => Ok(Self::Closing),
            // A volume may grow by itself while it is being closed, which no longer matters to anyone.
            (Self::Closing, VolumeStep::Closed | VolumeStep::Resized(_)) => Ok(Self::Closing),
            (Self::Opening | Self::Open(_) | Self::Closing, VolumeStep::Failed(reason)) => {
                Ok(Self::Failed { reason })
            }
            (state, step) => Err(IllegalTransition {
                state: state.word(),
                step: step.word(),
            }),
        }
    }
}

impl VolumeStep {
    fn word(&self) -> &'static str {
        match self {
            Self::Opened(_) => "its opening",
            Self::Resized(_) => "another size",
            Self::Reopen => "opening it again",
            Self::Close => "closing it",
            Self::Closed => "its end",
            Self::Failed(_) => "failing",
        }
    }
}

/// How a network stands. As with a [`VolumeState`], one that failed may be tried again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetworkState {
    /// The data half was asked for it.
    Opening,
    /// Functions can be in it.
    Open(NetworkInfo),
    /// The data half was asked to let go of it.
    Closing,
    /// It cannot be used.
    Failed {
        /// Why.
        reason: String,
    },
}

/// What happens to a network.
#[derive(Clone, Debug)]
pub(super) enum NetworkStep {
    Opened(NetworkInfo),
    Reopen,
    Close,
    Closed,
    Failed(String),
}

impl NetworkState {
    /// The state in one word.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Opening => "opening",
            Self::Open(_) => "open",
            Self::Closing => "closing",
            Self::Failed { .. } => "failed",
        }
    }

    pub(super) fn next(&self, step: NetworkStep) -> Result<Self, IllegalTransition> {
        match (self, step) {
            (Self::Opening, NetworkStep::Opened(info)) => Ok(Self::Open(info)),
            (Self::Failed { .. }, NetworkStep::Reopen) => Ok(Self::Opening),
            (Self::Open(_), NetworkStep::Close) | (Self::Closing, NetworkStep::Closed) => {
                Ok(Self::Closing)
            }
            (Self::Opening | Self::Open(_) | Self::Closing, NetworkStep::Failed(reason)) => {
                Ok(Self::Failed { reason })
            }
            (state, step) => Err(IllegalTransition {
                state: state.word(),
                step: match step {
                    NetworkStep::Opened(_) => "its opening",
                    NetworkStep::Reopen => "opening it again",
                    NetworkStep::Close => "closing it",
                    NetworkStep::Closed => "its end",
                    NetworkStep::Failed(_) => "failing",
                },
            }),
        }
    }
}

/// How a function stands.
///
/// ```text
///   Waiting --> Attaching --> Idle <--> Connected
///      ^            |           |           |
///      |            v           v           v
///      |          Failed      Detaching (Idle and Connected can fail too)
///      `------------+-----------'  `--> (gone)
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FunctionState {
    /// Its volume or network is not open yet.
    Waiting,
    /// The data half was asked for it.
    Attaching,
    /// Its socket is served, and no front end is there.
    Idle,
    /// A front end is there.
    Connected(SessionInfo),
    /// The data half was asked to let go of it.
    Detaching {
        /// What it becomes; where `None`, it goes.
        next: Option<Box<FunctionSpec>>,
    },
    /// It does not work.
    Failed {
        /// Why.
        reason: String,
    },
}

/// What happens to a function.
#[derive(Clone, Debug)]
pub(super) enum FunctionStep {
    Attached,
    FrontEnd(SessionInfo),
    FrontEndGone,
    Detach { next: Option<Box<FunctionSpec>> },
    Wait,
    Failed(String),
}

impl FunctionState {
    /// The state in one word.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Attaching => "attaching",
            Self::Idle => "idle",
            Self::Connected(_) => "connected",
            Self::Detaching { .. } => "detaching",
            Self::Failed { .. } => "failed",
        }
    }

    /// Whether the data half serves it, or is about to.
    pub fn is_attached(&self) -> bool {
        matches!(
            self,
            Self::Attaching | Self::Idle | Self::Connected(_) | Self::Detaching { .. }
        )
    }

    pub(super) fn illegal(&self, step: &FunctionStep) -> IllegalTransition {
        IllegalTransition {
            state: self.word(),
            step: step.word(),
        }
    }

    pub(super) fn next(&self, step: FunctionStep) -> Result<Self, IllegalTransition> {
        match (self, step) {
            (Self::Attaching, FunctionStep::Attached) => Ok(Self::Idle),
            (Self::Idle | Self::Connected(_), FunctionStep::FrontEnd(session)) => {
                Ok(Self::Connected(session))
            }
            (Self::Idle | Self::Connected(_), FunctionStep::FrontEndGone) => Ok(Self::Idle),
            (Self::Idle | Self::Connected(_), FunctionStep::Detach { next }) => {
                Ok(Self::Detaching { next })
            }
            // Front ends come and go until the data half has read that it shall let go.
            (
                state @ Self::Detaching { .. },
                FunctionStep::FrontEnd(_) | FunctionStep::FrontEndGone,
            ) => Ok(state.clone()),
            (Self::Waiting | Self::Detaching { .. } | Self::Failed { .. }, FunctionStep::Wait) => {
                Ok(Self::Waiting)
            }
            (
                Self::Attaching | Self::Idle | Self::Connected(_) | Self::Detaching { .. },
                FunctionStep::Failed(reason),
            ) => Ok(Self::Failed { reason }),
            (state, step) => Err(state.illegal(&step)),
        }
    }
}

impl FunctionStep {
    fn word(&self) -> &'static str {
        match self {
            Self::Attached => "its attachment",
            Self::FrontEnd(_) => "a front end",
            Self::FrontEndGone => "the end of a front end",
            Self::Detach { .. } => "detaching it",
            Self::Wait => "its detachment",
            Self::Failed(_) => "failing",
        }
    }
}
