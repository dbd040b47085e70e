//! Backends, as the cluster knows them: what operators set, and what follows from what other nodes
//! say.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::bail;
use baton_ha::driver::Handle;
use baton_ha::state::settings::Setting;
use baton_ha::state::sick::GiveWay;
use baton_ha::state::{Target, Value};

use super::{Balancer, Done, Step};
use crate::cluster::{Follower, GaveWay, apply_settings};
use crate::pool::{Admin, Member, Pool};

/// How often the pools are brought in line where nothing is known to have changed: how late the
/// peers may hear of a verdict.
const FOLLOW: Duration = Duration::from_millis(50);
/// When settings that could not be written are tried again, at the latest.
const KEEP_AGAIN: Duration = Duration::from_secs(10);

impl Balancer {
    /// Sets something about backends, for the whole cluster.
    pub(super) async fn set_backend(&self, name: &str, value: Value) -> anyhow::Result<Done> {
        let live = self.live.lock().await;
        let found = members(&live.pools, name);
        let mut steps = Vec::new();
        let mut step = |what| steps.push(Step { t_ms: 0.0, node: None, what });
        let was: Vec<_> = found.iter().map(|(_, member)| said(member, value)).collect();
        for (pool, member) in &found {
            self.cluster.set(pool.service.target(&member.backend), value)?;
        }
        apply_settings(&self.cluster, &live.pools);
        for ((pool, member), was) in found.iter().zip(was) {
            let name = format!("{}/{}", pool.service.name, member.backend.name);
            step(format!("{name}: {was} → {}", said(member, value)));
        }
        if found.is_empty() {
            let gone = settings_of(&self.cluster.settings(), name);
            if gone.is_empty() || !value.is_default() {
                bail!("there is no backend `{name}`; there are {}", known(&live.pools).join(", "));
            }
            for target in gone {
                self.cluster.set(target, value)?;
                step(format!("{} behind {}: as the file says", target.backend(), target.service()));
            }
        }
        let summary = match value {
            Value::Admin(Admin::Enabled) => "new connections may go there again",
            Value::Admin(Admin::Drained) => {
                "no new connections go there; those it has end by themselves"
            }
            Value::Admin(Admin::Disabled) => "no new connections go there; those it had are reset",
            Value::Weight(Some(_)) => "new connections are shared by that weight",
            Value::Weight(None) => "new connections are shared by the file's weight",
        };
        drop(live);
        Ok(Done::simple(&format!("{summary}{}", self.told().await), steps))
    }

    /// Whether the others know, and this node's disk; it is not waited for long.
    async fn told(&self) -> String {
        const PATIENCE: Duration = Duration::from_millis(500);
        let mut left = PATIENCE;
        loop {
            let (_, others) = self.cluster.agreed();
            let kept = self.cluster.is_kept();
            if others.is_empty() && kept {
                return String::new();
            }
            if left.is_zero() {
                let mut untold = String::new();
                if !others.is_empty() {
                    let others = others.join(", ");
                    untold = format!("; {others} can't be told now, and learns it when it is back");
                }
                if !kept {
                    let kept = self.cluster.kept();
                    let why = kept.trouble.as_deref().unwrap_or("is slow to write");
                    untold +=
                        &format!("; it is not on this node's disk: {} {why}", kept.file.display());
                }
                return untold;
            }
            let pause = Duration::from_millis(5);
            tokio::time::sleep(pause).await;
            left = left.saturating_sub(pause);
        }
    }

    /// Brings the pools in line with what the cluster knows, and tells it what they see; gives way
    /// to a peer that sees more.
    pub(super) async fn follow_cluster(self: Arc<Self>) {
        let Some((ha, handle)) = &self.election else { return };
        let sick_after = self.live.lock().await.config.sick_after;
        let mut follower = Follower::new(Arc::clone(&self.cluster), ha, sick_after);
        let (mut news, mut view) = (self.cluster.news(), handle.view());
        loop {
            let give_way = {
                let live = self.live.lock().await;
                let view = view.borrow_and_update().clone();
                follower.follow(&live.pools, &view)
            };
            if let Some(give_way) = give_way {
                let (to, seen) = (self.cluster.name(give_way.to), give_way.seen);
                if let Some(journal) = &self.journal {
                    journal.did(&format!(
                        "gives way to {to}, which sees {} healthy backends, this node {}",
                        seen.there, seen.here
                    ));
                }
                tokio::spawn(Arc::clone(&self).give(handle.clone(), give_way));
            }
            tokio::select! {
                _ = news.changed() => {}
                changed = view.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(FOLLOW) => {}
            }
        }
    }

    /// Keeps on the disk what operators have set, here or elsewhere. The disk is waited for apart
    /// from everything else.
    pub(super) async fn keep_settings(self: Arc<Self>) {
        let mut news = self.cluster.news();
        loop {
            news.borrow_and_update();
            let cluster = Arc::clone(&self.cluster);
            if let Err(error) = tokio::task::spawn_blocking(move || cluster.keep()).await {
                tracing::error!(%error, "settings are not kept");
            }
            // Views are news too; and a disk that was full may not be any more.
            tokio::time::sleep(FOLLOW).await;
            if self.cluster.is_kept() {
                let _ = news.changed().await;
            } else {
                let _ = tokio::time::timeout(KEEP_AGAIN, news.changed()).await;
            }
        }
    }

    /// Yields, since a peer sees more healthy backends.
    async fn give(self: Arc<Self>, handle: Handle, GiveWay { to, seen }: GiveWay) {
        let (here, there, to) = (seen.here, seen.there, self.cluster.name(to));
        tracing::warn!(here, there, peer = to, "gives way: that peer sees more healthy backends");
        match handle.yield_now(true).await {
            Ok(_) => self.cluster.note_gave_way(GaveWay { at: Instant::now(), to, seen }),
            Err(error) => tracing::warn!(peer = to, "gave way in vain: {error}"),
        }
    }
}

/// The members that `BACKEND` or `SERVICE/BACKEND` means.
fn members<'a>(pools: &'a [Arc<Pool>], name: &str) -> Vec<(&'a Arc<Pool>, &'a Arc<Member>)> {
    let all = pools.iter().flat_map(|pool| pool.members.iter().map(move |member| (pool, member)));
    all.filter(|(pool, member)| {
        let (service, backend) = (&pool.service.name, &member.backend.name);
        name == backend || name == format!("{service}/{backend}")
    })
    .collect()
}

/// What settings there are of a backend at this address, which may be in no file any more.
fn settings_of(settings: &[Setting], address: &str) -> Vec<Target> {
    let of = settings.iter().map(|setting| setting.target);
    let mut found: Vec<_> = of.filter(|target| target.backend().to_string() == address).collect();
    found.dedup();
    found
}

fn known(pools: &[Arc<Pool>]) -> Vec<String> {
    let name = |pool: &Arc<Pool>, member: &Arc<Member>| {
        format!("{}/{}", pool.service.name, member.backend.name)
    };
    pools.iter().flat_map(|pool| pool.members.iter().map(|member| name(pool, member))).collect()
}

/// What the member is set to, of the kind of that value.
fn said(member: &Member, value: Value) -> String {
    match value {
        Value::Admin(_) => member.admin().to_string(),
        Value::Weight(_) => format!("weight {}", member.weight()),
    }
}
