//! The gauge: how many flows would outlive the Active right now, and how far its peers are behind.
//!
//! The Active knows it of each peer: by the last comparison of both tables, and by what that peer has
//! not acknowledged since. A Backup knows of itself whether it follows the Active, and what the last
//! comparison came to.

use std::time::Instant;

use baton_ha::driver::PeerView;
use baton_ha::sync::frame::Compared;
use baton_ha::sync::{receiver, source};
use serde::{Deserialize, Serialize};

use super::render::{ago, counted};
use crate::replication::Replication;

/// How flows get to the other nodes, or from the Active.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReplicationStatus {
    /// Established flows in this node's table.
    #[serde(default)]
    pub flows: u32,
    /// Which share of the Active's flows would survive it now, 0 to 1. On the Active: on the peer
    /// that has most of them; 0 where none has any. On a Backup: on this node; `None` until it is
    /// known.
    #[serde(default)]
    pub surviving: Option<f64>,
    /// On the Active, the same of the connected peer that has least: 0 where one is not in sync;
    /// `None` without any.
    #[serde(default)]
    pub surviving_least: Option<f64>,
    /// As the Active: each peer.
    pub to: Vec<ReplicaStatus>,
    /// As a Backup: what this node has.
    pub from: Option<FromActive>,
    /// As a Backup: how many seconds ago its table was last compared with the Active's.
    #[serde(default)]
    pub compared_s: Option<f64>,
    /// Flows that came and have no service or backend here: the nodes' files differ.
    pub unplaced: u64,
}

/// A peer that has this node's flows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReplicaStatus {
    /// Its name.
    pub peer: String,
    /// Whether it is connected: only then could it take over with what it has.
    #[serde(default)]
    pub connected: bool,
    /// Whether it has every flow but those of the lag; `false` where it takes no part too.
    pub in_sync: bool,
    /// Why not, in words.
    pub why: Option<String>,
    /// Changes that it has not acknowledged: flows that began, ended or were used.
    pub lag_changes: u64,
    /// How old the oldest of these is, in milliseconds.
    pub lag_ms: f64,
    /// How often it was sent everything.
    pub snapshots: u64,
    /// Which share of the flows would survive this node now: those that it is known to have, by
    /// the last comparison of the tables and what has not been acknowledged since. `None`: it is
    /// not in sync.
    pub surviving: Option<f64>,
}

/// What a Backup has of the Active's flows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FromActive {
    /// Nothing that is known to be right.
    Nothing,
    /// They are being sent.
    Snapshot,
    /// Everything but the lag.
    InSync,
    /// What there was when the channel to the Active was lost.
    Stale,
}

impl ReplicationStatus {
    /// What replication says of itself, with the peers in the order of the channel; `flows` are
    /// those of this node.
    pub fn of(replication: &Replication, peers: &[PeerView], flows: u32, now: Instant) -> Self {
        let from = replication.receiver.map(FromActive::from);
        let unplaced = replication.unplaced;
        if from.is_some() {
            let compared = replication.compared.map(|(_, compared)| share_kept(&compared));
            let surviving = match from {
                Some(FromActive::InSync | FromActive::Stale) => compared,
                Some(FromActive::Nothing | FromActive::Snapshot) | None => Some(0.0),
            };
            let ago = |at| now.saturating_duration_since(at).as_secs_f64();
            let compared_s = replication.compared.map(|(at, _)| ago(at));
            let (to, surviving_least) = (Vec::new(), None);
            return Self { flows, surviving, surviving_least, to, from, compared_s, unplaced };
        }
        let standings = replication.peers.iter().chain(std::iter::repeat(&None));
        let to = peers.iter().zip(standings);
        let to: Vec<_> =
            to.map(|(peer, standing)| ReplicaStatus::of(peer, standing.as_ref(), flows)).collect();
        let shares =
            to.iter().filter(|peer| peer.connected).map(|peer| peer.surviving.unwrap_or(0.0));
        Self {
            flows,
            surviving: Some(shares.clone().fold(0.0, f64::max)),
            surviving_least: shares.min_by(f64::total_cmp),
            to,
            from,
            compared_s: None,
            unplaced,
        }
    }

    /// The same in words, a line each; those that want an operator's attention begin with `!`.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = match self.from {
            Some(from) => vec![self.as_backup(from)],
            None => self.as_active(),
        };
        if self.unplaced > 0 {
            let unplaced = counted(self.unplaced, "flow");
            lines.push(format!(
                "! {unplaced} of the Active's have no service or backend in this node's file"
            ));
        }
        lines
    }

    fn as_backup(&self, from: FromActive) -> String {
        let share = match (self.surviving, self.compared_s) {
            (Some(share), Some(seconds)) => format!(
                "; {} of the Active's were the same here when last compared, {} ago",
                percent(share),
                ago(seconds)
            ),
            (_, _) => "; not compared yet".to_owned(),
        };
        let here = counted(self.flows.into(), "flow");
        match from {
            FromActive::Nothing => {
                "! would survive the Active here: 0 %, this node has no copy of its flows".into()
            }
            FromActive::Snapshot => {
                "! would survive the Active here: 0 %, its flows are on their way".into()
            }
            FromActive::InSync => format!("in sync with the Active, {here}{share}"),
            FromActive::Stale => {
                format!("{here}, as they were when the channel to the Active was lost{share}")
            }
        }
    }

    fn as_active(&self) -> Vec<String> {
        let here = counted(self.flows.into(), "flow");
        let most = self.surviving.unwrap_or(0.0);
        let copies = self.to.iter().any(|peer| peer.surviving.is_some());
        let mut lines = Vec::new();
        if !copies {
            lines.push(format!("! would survive this node now: 0 % of {here}, no node has a copy"));
        } else {
            let least = match self.surviving_least {
                Some(least) if least < most => {
                    format!(" (on the one that has least {})", percent(least))
                }
                Some(_) | None => String::new(),
            };
            lines.push(format!("would survive this node now: {} of {here}{least}", percent(most)));
        }
        lines.extend(self.to.iter().map(ReplicaStatus::line));
        lines
    }
}

impl ReplicaStatus {
    fn of(peer: &PeerView, standing: Option<&source::Standing>, flows: u32) -> Self {
        let connected = peer.up.is_ok();
        let Some(standing) = standing.filter(|_| connected) else {
            return Self {
                peer: peer.name.clone(),
                connected,
                in_sync: false,
                why: Some(match &peer.up {
                    Ok(_) => "it has not asked for this node's flows".into(),
                    Err(why) => format!("no peer channel: {why}"),
                }),
                lag_changes: 0,
                lag_ms: 0.0,
                snapshots: 0,
                surviving: None,
            };
        };
        let why = match (standing.in_sync, standing.snapshot_flows) {
            (true, _) => None,
            (false, Some(sent)) => Some(format!("a snapshot is on its way, {sent} flows so far")),
            (false, None) => Some("a snapshot is about to begin".into()),
        };
        Self {
            peer: peer.name.clone(),
            connected,
            in_sync: standing.in_sync,
            why,
            lag_changes: standing.lag_changes,
            lag_ms: standing.lag.as_secs_f64() * 1e3,
            snapshots: standing.snapshots,
            surviving: standing.in_sync.then(|| share(standing, flows)),
        }
    }

    fn line(&self) -> String {
        let Self { peer, lag_changes, lag_ms, .. } = self;
        match (&self.why, self.surviving) {
            (None, Some(share)) => format!(
                "{peer} is in sync, {} behind ({lag_ms:.0} ms): {}",
                counted(*lag_changes, "change"),
                percent(share)
            ),
            (why, _) => {
                let why = why.as_deref().unwrap_or("it is not in sync");
                format!("! {peer} has no copy that is known to be right: {why}")
            }
        }
    }
}

/// Of all flows, those that the peer is known to have. What has not been acknowledged counts as
/// missing, though some of it is the end of a flow.
fn share(standing: &source::Standing, flows: u32) -> f64 {
    let compared = standing.compared.unwrap_or_default();
    let flows = u64::from(flows).max(compared.flows);
    let doubtful = compared.flows.saturating_sub(compared.kept) + standing.lag_changes;
    match (flows, doubtful) {
        (_, 0) => 1.0,
        (0, _) => 0.0,
        (flows, doubtful) => 1.0 - (doubtful as f64 / flows as f64).min(1.0),
    }
}

fn share_kept(compared: &Compared) -> f64 {
    if compared.flows == 0 { 1.0 } else { compared.kept as f64 / compared.flows as f64 }
}

/// Never rounded up to all.
fn percent(share: f64) -> String {
    format!("{:.2} %", (share * 1e4).floor() / 1e2)
}

impl From<receiver::Standing> for FromActive {
    fn from(standing: receiver::Standing) -> Self {
        match standing {
            receiver::Standing::Nothing => Self::Nothing,
            receiver::Standing::Snapshot { .. } => Self::Snapshot,
            receiver::Standing::InSync => Self::InSync,
            receiver::Standing::Stale => Self::Stale,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use baton_ha::channel::hello::BootId;
    use baton_ha::channel::session::Peer;

    use super::*;

    fn peer(name: &str, up: bool) -> PeerView {
        let peer = Peer { node: name.into(), version: 1, boot: BootId([0; 16]) };
        PeerView {
            name: name.into(),
            up: up.then_some(peer).ok_or_else(|| "it has closed the connection".into()),
            since: None,
            sent: 0,
            received: 0,
        }
    }

    fn standing(in_sync: bool, lag_changes: u64, kept: u64) -> Option<source::Standing> {
        let compared = Compared { buckets: 65_536, different: 1, flows: 1000, kept };
        Some(source::Standing {
            in_sync,
            lag_changes,
            lag: Duration::from_millis(3),
            snapshots: 1,
            snapshot_flows: (!in_sync).then_some(7),
            compared: Some(compared),
        })
    }

    fn active(peers: Vec<Option<source::Standing>>) -> Replication {
        Replication { peers, ..Replication::default() }
    }

    #[test]
    fn an_active_says_what_would_survive_on_whom() {
        let now = Instant::now();
        let peers = [peer("b", true), peer("c", true), peer("d", false)];
        let gauge = |peers: &[PeerView], standings| {
            ReplicationStatus::of(&active(standings), peers, 1000, now)
        };
        let most = |of: &ReplicationStatus| (of.surviving, of.surviving_least);
        let all = gauge(&peers, vec![standing(true, 0, 1000), standing(true, 5, 995), None]);
        assert_eq!(most(&all), (Some(1.0), Some(0.99)), "the one that is gone can't take over");
        assert_eq!(
            all.lines(),
            [
                "would survive this node now: 100.00 % of 1000 flows (on the one that has least \
                 99.00 %)",
                "b is in sync, 0 changes behind (3 ms): 100.00 %",
                "c is in sync, 5 changes behind (3 ms): 99.00 %",
                "! d has no copy that is known to be right: no peer channel: it has closed the \
                 connection",
            ]
        );
        let behind = gauge(&peers, vec![standing(true, 0, 1000), standing(false, 0, 1000), None]);
        assert_eq!(most(&behind), (Some(1.0), Some(0.0)));
        // The peer has gone; its standing may be a moment old.
        let gone = gauge(&[peer("b", false)], vec![standing(true, 0, 1000)]);
        assert_eq!(most(&gone), (Some(0.0), None));
        assert_eq!(
            gone.lines()[0],
            "! would survive this node now: 0 % of 1000 flows, no node has a copy"
        );
        // It was never there, and nothing was published yet.
        let never = gauge(&[peer("b", false)], Vec::new());
        assert_eq!((most(&never), never.to.len()), ((Some(0.0), None), 1));
        assert_eq!(gauge(&[], Vec::new()).lines()[0], gone.lines()[0]);
    }

    #[test]
    fn what_is_not_acknowledged_does_not_survive() {
        let share = |lag, kept, flows| share(&standing(true, lag, kept).unwrap(), flows);
        assert_eq!(share(0, 1000, 1000), 1.0);
        assert_eq!(share(10, 1000, 1000), 0.99);
        assert_eq!(share(10, 990, 2000), 0.99);
        assert_eq!(share(5000, 1000, 1000), 0.0);
        assert_eq!(share(0, 1000, 0), 1.0);
        let none = source::Standing { compared: None, ..standing(true, 3, 0).unwrap() };
        assert_eq!(super::share(&none, 0), 0.0, "of flows that are not counted yet");
    }

    #[test]
    fn a_backup_says_what_it_has() {
        let now = Instant::now();
        let compared = Compared { buckets: 65_536, different: 1, flows: 1000, kept: 999 };
        let at = now - Duration::from_secs(2);
        let gauge = |receiver, compared| {
            let replication =
                Replication { receiver: Some(receiver), compared, ..Replication::default() };
            ReplicationStatus::of(&replication, &[peer("a", true)], 1000, now)
        };
        let in_sync = gauge(receiver::Standing::InSync, Some((at, compared)));
        assert_eq!((in_sync.surviving, in_sync.to.len()), (Some(0.999), 0));
        assert_eq!(
            in_sync.lines(),
            [
                "in sync with the Active, 1000 flows; 99.90 % of the Active's were the same here when \
              last compared, 2.0 s ago"
            ]
        );
        assert_eq!(gauge(receiver::Standing::InSync, None).surviving, None);
        for nothing in [receiver::Standing::Nothing, receiver::Standing::Snapshot { flows: 3 }] {
            let gauge = gauge(nothing, Some((at, compared)));
            assert_eq!(gauge.surviving, Some(0.0), "whatever was compared before");
            assert!(gauge.lines()[0].starts_with("! would survive the Active here: 0 %"));
        }
    }

    #[test]
    fn a_share_is_never_rounded_up_to_all() {
        assert_eq!(percent(0.999_999), "99.99 %");
        assert_eq!(percent(1.0), "100.00 %");
    }
}
