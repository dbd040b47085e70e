//! A worker: one thread with its own runtime, listeners and sessions, which never leave it. So
//! nothing on a packet's way is shared between threads but counters.

use std::cell::RefCell;
use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::rc::Rc;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::AbortHandle;
use tracing::warn;

use super::capacity::Capacity;
use super::half::{COPIED_MOST, Tools};
use super::pipe::Pipes;
use super::seat::Which;
use super::tcp::TcpFront;
use super::udp::UdpFront;
use crate::pool::Pool;
use crate::service::{Protocol, Service};

/// What the sessions of a worker share.
pub(crate) struct Shared {
    pub(crate) capacity: Arc<Capacity>,
    pub(crate) tools: RefCell<Tools>,
    /// Room for one datagram on its way back.
    pub(crate) datagram: RefCell<Box<[u8]>>,
}

/// What makes a service the same one after a reload.
pub(crate) type Key = (SocketAddr, Protocol);

pub(crate) fn key(service: &Service) -> Key {
    (service.listen, service.protocol)
}

/// A bound socket that clients reach.
pub(crate) enum Opened {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

/// What a worker is asked to do; it answers when it is done.
pub(crate) enum Command {
    /// Serve a further service.
    Serve(Arc<Pool>, Opened),
    /// Go on with a renewed pool of a service that is served already.
    Renew(Arc<Pool>),
    /// Stop serving it; its TCP sessions end by themselves.
    Close(Key),
    /// Stop accepting, everywhere.
    CloseAll,
    /// Reset sessions; the answer is how many there were.
    Reset(Which),
    /// Count the TCP sessions.
    Count,
}

/// A command, and where its answer goes.
pub(crate) type Asked = (Command, oneshot::Sender<usize>);

/// Starts a worker that serves these. It ends, with a reset of its sessions, when the sender is
/// dropped.
pub(crate) fn start(
    index: usize,
    capacity: Arc<Capacity>,
    services: Vec<(Arc<Pool>, Opened)>,
) -> io::Result<super::Worker> {
    let (sender, commands) = mpsc::channel(16);
    let (ready, started) = std::sync::mpsc::channel();
    let work = move || {
        let runtime = Builder::new_current_thread()
            .enable_all()
            // Sockets are looked at after this many sessions had their turn.
            .event_interval(16)
            .build_local(LocalOptions::default());
        let runtime = match runtime {
            Ok(runtime) => runtime,
            Err(error) => return ready.send(Err(error)).unwrap_or(()),
        };
        runtime.block_on(async {
            let mut worker = Worker::new(capacity);
            for (pool, socket) in services {
                if let Err(error) = worker.serve(pool, socket) {
                    return ready.send(Err(error)).unwrap_or(());
                }
            }
            let _ = ready.send(Ok(()));
            worker.run(commands).await;
        });
    };
    let thread = thread::Builder::new().name(format!("baton-proxy-{index}")).spawn(work)?;
    started.recv().map_err(io::Error::other)??;
    Ok(super::Worker { commands: Some(sender), thread: Some(thread) })
}

struct Worker {
    shared: Rc<Shared>,
    fronts: Vec<Front>,
    /// TCP services that are no longer served but have sessions still.
    closed: Vec<Rc<TcpFront>>,
}

struct Front {
    key: Key,
    kind: Kind,
    tasks: [AbortHandle; 2],
}

enum Kind {
    Tcp(Rc<TcpFront>),
    Udp(Rc<UdpFront>),
}

impl Worker {
    fn new(capacity: Arc<Capacity>) -> Self {
        let tools = Tools { pipes: Pipes::new(capacity.pipes), buffer: Box::new([0; COPIED_MOST]) };
        let shared = Shared {
            capacity,
            tools: RefCell::new(tools),
            datagram: RefCell::new(vec![0; 1 << 16].into()),
        };
        Self { shared: Rc::new(shared), fronts: Vec::new(), closed: Vec::new() }
    }

    async fn run(mut self, mut commands: mpsc::Receiver<Asked>) {
        while let Some((command, answer)) = commands.recv().await {
            let done = self.obey(command);
            let _ = answer.send(done);
        }
        self.close_all();
        self.reset(&Which::All);
        // Each session has only to drop its sockets; the bound is for the unforeseen.
        for _ in 0..1000 {
            if self.sessions() == 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    fn obey(&mut self, command: Command) -> usize {
        match command {
            Command::Serve(pool, socket) => {
                let service = Arc::clone(&pool.service);
                if let Err(error) = self.serve(pool, socket) {
                    warn!(service = service.name, %error, "a worker can't serve it");
                }
            }
            Command::Renew(pool) => self.renew(pool),
            Command::Close(key) => self.close(key),
            Command::CloseAll => self.close_all(),
            Command::Reset(which) => return self.reset(&which),
            Command::Count => return self.sessions(),
        }
        0
    }

    fn serve(&mut self, pool: Arc<Pool>, socket: Opened) -> io::Result<()> {
        let (kind, tasks) = Front::start(&pool, socket, &self.shared)?;
        self.fronts.push(Front { key: key(&pool.service), kind, tasks });
        Ok(())
    }

    fn renew(&self, pool: Arc<Pool>) {
        for front in self.fronts.iter().filter(|front| front.key == key(&pool.service)) {
            match &front.kind {
                Kind::Tcp(tcp) => *tcp.pool.borrow_mut() = Arc::clone(&pool),
                Kind::Udp(udp) => {
                    *udp.pool.borrow_mut() = Arc::clone(&pool);
                    udp.heed_members();
                }
            }
        }
    }

    fn close(&mut self, key: Key) {
        self.closed.retain(|tcp| tcp.seats.len() > 0);
        for front in self.fronts.extract_if(.., |front| front.key == key) {
            match &front.kind {
                Kind::Tcp(tcp) => {
                    tcp.close();
                    self.closed.push(Rc::clone(tcp));
                    // The task that heeds members goes on, for the sessions that are left.
                    front.tasks[0].abort();
                }
                Kind::Udp(udp) => {
                    udp.reset(&Which::All);
                    front.tasks.iter().for_each(AbortHandle::abort);
                }
            }
        }
    }

    fn close_all(&mut self) {
        for front in &self.fronts {
            match &front.kind {
                Kind::Tcp(tcp) => {
                    tcp.close();
                    front.tasks[0].abort();
                }
                Kind::Udp(udp) => udp.close(),
            }
        }
    }

    fn reset(&self, which: &Which) -> usize {
        let closed: usize = self.closed.iter().map(|tcp| tcp.reset(which)).sum();
        let served = self.fronts.iter().map(|front| match &front.kind {
            Kind::Tcp(tcp) => tcp.reset(which),
            Kind::Udp(udp) => udp.reset(which),
        });
        closed + served.sum::<usize>()
    }

    fn sessions(&self) -> usize {
        let served = self.fronts.iter().filter_map(|front| match &front.kind {
            Kind::Tcp(tcp) => Some(tcp),
            Kind::Udp(_) => None,
        });
        served.chain(&self.closed).map(|tcp| tcp.seats.len()).sum()
    }
}

impl Front {
    /// The front and its tasks: the one that takes in from clients, and the one that heeds
    /// changes of its members.
    fn start(
        pool: &Arc<Pool>,
        socket: Opened,
        shared: &Rc<Shared>,
    ) -> io::Result<(Kind, [AbortHandle; 2])> {
        let changes = pool.changes();
        let (pool, shared) = (Arc::clone(pool), Rc::clone(shared));
        match socket {
            Opened::Tcp(listener) => {
                let front = Rc::new(TcpFront::new(pool, listener, shared)?);
                let seats = Rc::clone(&front.seats);
                let heed = on_change(changes, move || seats.heed_members());
                Ok((Kind::Tcp(Rc::clone(&front)), [spawn(front.accept()), spawn(heed)]))
            }
            Opened::Udp(socket) => {
                let front = Rc::new(UdpFront::new(pool, socket, shared)?);
                let heeding = Rc::clone(&front);
                let heed = on_change(changes, move || heeding.heed_members());
                Ok((Kind::Udp(Rc::clone(&front)), [spawn(front.carry()), spawn(heed)]))
            }
        }
    }
}

fn spawn(task: impl Future<Output = ()> + 'static) -> AbortHandle {
    tokio::task::spawn_local(task).abort_handle()
}

/// Calls `heed` now and whenever a member of the pool, or of one that it is renewed to, changes.
async fn on_change(mut changes: watch::Receiver<u64>, heed: impl Fn()) {
    loop {
        heed();
        if changes.changed().await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::TcpStream;
    use std::path::Path;

    use super::*;
    use crate::config::Config;
    use crate::proxy::listen;

    /// More than the runtime lets a task have at once, and none of which it has heard.
    #[test]
    fn all_that_wait_in_the_kernels_queue_are_reset() {
        let text = "[node]\nname = \"n\"\n[[services]]\nname = \"s\"\nlisten = \"127.0.0.1:1\"\n\
                    [[services.backends]]\nname = \"b\"\naddress = \"127.0.0.1:2\"\n";
        let config = Config::parse(Path::new("test.toml"), text).expect("it is right");
        let pool = Arc::new(Pool::new(Arc::clone(&config.services[0])));
        let listener = listen::tcp("127.0.0.1:0".parse().expect("an address")).expect("a port");
        let address = listener.local_addr().expect("an address");
        let (commands, asked) = mpsc::channel(1);
        let (answer, mut reset) = oneshot::channel();
        let mut builder = Builder::new_current_thread();
        let runtime = builder.enable_all().build_local(LocalOptions::default());
        let runtime = runtime.expect("a runtime");
        runtime.block_on(async {
            let mut worker = Worker::new(Arc::new(Capacity::of_this_process(1, &[])));
            worker.serve(pool, Opened::Tcp(listener)).expect("served");
            let mut clients: Vec<_> =
                (0..300).map(|_| TcpStream::connect(address).expect("connected")).collect();
            commands.try_send((Command::Reset(Which::All), answer)).expect("room");
            drop(commands);
            worker.run(asked).await;
            assert_eq!(reset.try_recv(), Ok(300));
            for client in &mut clients {
                let end = client.read(&mut [0; 1]).expect_err("no orderly end");
                assert_eq!(end.kind(), io::ErrorKind::ConnectionReset);
            }
        });
    }
}
