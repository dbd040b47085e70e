//! The unix socket between `baton run` and the commands: one JSON object on a line asks, one
//! answers.
//!
//! It carries [`Request`]s to the [`crate::balancer`] and decides nothing. Only root may connect
//! (the socket is 0600). A request is at most [`MAX_REQUEST`] bytes and must come within
//! [`REQUEST_TIMEOUT`]; at most [`MAX_CLIENTS`] are served at once, further ones wait in the
//! socket's backlog.

use std::fmt;
use std::fs::{self, Permissions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::unistd::User;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;

/// Longest request, in bytes.
pub const MAX_REQUEST: u64 = 64 * 1024;
/// Longest answer, in bytes: far more than the status of any node takes.
pub const MAX_ANSWER: u64 = 64 << 20;
/// How long a client may take to send its request.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Clients served at once.
pub const MAX_CLIENTS: usize = 32;
/// Longest path of a unix socket on Linux, without the terminating zero.
pub const MAX_SOCKET_PATH: usize = 107;

/// What a command asks of the daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// A [`crate::status::Status`].
    Status,
    /// This node becomes Active now.
    Takeover {
        /// Whatever it costs.
        force: bool,
    },
    /// This node stops being Active now.
    Yield {
        /// Whatever it costs.
        force: bool,
    },
    /// The configuration file is read again.
    Reload,
    /// [`crate::datapath::sessions::Sessions`].
    Sessions(crate::datapath::sessions::Wanted),
    /// Ends flows: [`crate::datapath::sessions::Ended`].
    EndSessions(crate::datapath::sessions::Wanted),
    /// Sets what the operator says of a backend.
    SetBackend {
        /// `BACKEND`, or `SERVICE/BACKEND`; the first form means it in every service.
        backend: String,
        /// What the operator says.
        admin: crate::pool::Admin,
    },
    /// Sets a backend's weight.
    SetWeight {
        /// As above.
        backend: String,
        /// 1–256; `None`: what the file says.
        weight: Option<u16>,
    },
}

impl Request {
    /// Whether it is to change anything.
    pub fn changes(&self) -> bool {
        match self {
            Self::Status | Self::Sessions(_) => false,
            Self::Takeover { .. }
            | Self::Yield { .. }
            | Self::Reload
            | Self::EndSessions(_)
            | Self::SetBackend { .. }
            | Self::SetWeight { .. } => true,
        }
    }
}

/// As an operator would say it.
impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status => f.write_str("status"),
            Self::Takeover { force: false } => f.write_str("takeover"),
            Self::Takeover { force: true } => f.write_str("takeover --force"),
            Self::Yield { force: false } => f.write_str("yield"),
            Self::Yield { force: true } => f.write_str("yield --force"),
            Self::Reload => f.write_str("reload"),
            Self::Sessions(_) => f.write_str("sessions"),
            Self::EndSessions(_) => f.write_str("sessions kill"),
            Self::SetBackend { backend, admin } => write!(f, "{backend} {admin}"),
            Self::SetWeight { backend, weight: Some(weight) } => {
                write!(f, "weight of {backend} {weight}")
            }
            Self::SetWeight { backend, weight: None } => {
                write!(f, "weight of {backend} as in the file")
            }
        }
    }
}

/// What the daemon answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// Done; what there is to say of it.
    Ok(serde_json::Value),
    /// Not done, and why.
    Error(String),
    /// Not done, nothing changed, and why; with `force` it would have been.
    Unready(String),
}

impl Reply {
    /// A reply with a value.
    pub fn ok(value: impl Serialize) -> Self {
        match serde_json::to_value(value) {
            Ok(value) => Reply::Ok(value),
            Err(error) => Reply::Error(format!("the answer can't be written as JSON: {error}")),
        }
    }
}

/// Why a command got no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody listens on the socket.
    #[error(
        "no daemon answers on {socket}; is `baton run` running, and is this its `control` socket \
         (see --socket)?"
    )]
    Unreachable {
        /// The socket.
        socket: PathBuf,
        /// The error.
        #[source]
        source: io::Error,
    },
    /// The socket is there, but not for this user.
    #[error("the control socket {0} is for root: run this as root, or with sudo")]
    Forbidden(PathBuf),
    /// The daemon went away or said something that is not an answer.
    #[error("the daemon on {socket} gave no answer")]
    NoAnswer {
        /// The socket.
        socket: PathBuf,
        /// The error.
        #[source]
        source: io::Error,
    },
}

/// Asks the daemon and waits for its answer, at most `patience`.
pub fn ask(socket: &Path, request: &Request, patience: Duration) -> Result<Reply, AskError> {
    exchange(connect(socket)?, request, patience)
        .map_err(|source| AskError::NoAnswer { socket: socket.to_owned(), source })
}

/// Asks the daemon and leaves it alone with that.
pub fn tell(socket: &Path, request: &Request, patience: Duration) -> Result<(), AskError> {
    send(&mut connect(socket)?, request, patience)
        .map_err(|source| AskError::NoAnswer { socket: socket.to_owned(), source })
}

fn connect(socket: &Path) -> Result<StdUnixStream, AskError> {
    StdUnixStream::connect(socket).map_err(|source| match source.kind() {
        io::ErrorKind::PermissionDenied => AskError::Forbidden(socket.to_owned()),
        _ => AskError::Unreachable { socket: socket.to_owned(), source },
    })
}

fn send(stream: &mut StdUnixStream, request: &Request, patience: Duration) -> io::Result<()> {
    stream.set_write_timeout(Some(patience))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)
}

fn exchange(mut stream: StdUnixStream, request: &Request, patience: Duration) -> io::Result<Reply> {
    stream.set_read_timeout(Some(patience))?;
    send(&mut stream, request, patience)?;
    let mut answer = String::new();
    BufReader::new(stream.take(MAX_ANSWER)).read_line(&mut answer)?;
    if answer.is_empty() {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it closed the connection"));
    }
    Ok(serde_json::from_str(&answer)?)
}

/// Answers requests; [`crate::balancer`] is the one in the daemon.
pub trait Answer: Send + Sync + 'static {
    /// The reply to a request.
    fn answer(&self, request: Request, caller: Caller) -> impl Future<Output = Reply> + Send;
}

/// Who asks, as far as the kernel knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// The user whose rights the program has.
    uid: u32,
    /// The user who logged in, where the kernel keeps that.
    login: Option<u32>,
    pid: Option<i32>,
    /// What the program calls itself.
    program: Option<String>,
}

impl Caller {
    /// The other end of a connection.
    fn of(stream: &UnixStream) -> io::Result<Self> {
        let peer = stream.peer_cred()?;
        let read = |pid: i32, what: &str| {
            fs::read_to_string(format!("/proc/{pid}/{what}"))
                .ok()
                .map(|text| text.trim().to_owned())
        };
        let login = peer.pid().and_then(|pid| read(pid, "loginuid")?.parse().ok());
        Ok(Self {
            uid: peer.uid(),
            // All ones: nobody has logged in.
            login: login.filter(|uid| *uid != u32::MAX),
            pid: peer.pid(),
            program: peer.pid().and_then(|pid| read(pid, "comm")),
        })
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let user = |uid: u32| match User::from_uid(uid.into()) {
            Ok(Some(user)) => user.name,
            Ok(None) | Err(_) => format!("uid {uid}"),
        };
        match self.login.filter(|login| *login != self.uid) {
            Some(login) => write!(f, "{} as {}", user(login), user(self.uid))?,
            None => f.write_str(&user(self.uid))?,
        }
        match (&self.program, self.pid) {
            (Some(program), Some(pid)) => write!(f, ", {program} (pid {pid})"),
            (None, Some(pid)) => write!(f, ", pid {pid}"),
            (_, None) => Ok(()),
        }
    }
}

/// Why the socket could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another daemon answers on it.
    #[error(
        "another baton already runs with the control socket {0}: stop it, or give this node \
         another `control` in [node]"
    )]
    InUse(PathBuf),
    /// Something else is there.
    #[error("{0} exists and is not a socket: remove it, or write another `control` in [node]")]
    NotASocket(PathBuf),
    /// A system call failed.
    #[error("can't listen on the control socket {path}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// The error.
        #[source]
        source: io::Error,
    },
}

/// The listening socket; its file is removed when it is dropped.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
}

impl Socket {
    /// Opens the socket, mode 0600, replacing one that a dead daemon left behind.
    pub fn bind(path: &Path) -> Result<Self, BindError> {
        let failed = |source| BindError::Io { path: path.to_owned(), source };
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(failed)?;
        }
        match fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => {
                return Err(BindError::NotASocket(path.to_owned()));
            }
            Ok(_) if StdUnixStream::connect(path).is_ok() => {
                return Err(BindError::InUse(path.to_owned()));
            }
            Ok(_) => fs::remove_file(path).map_err(failed)?,
            Err(_) => {}
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(failed)?;
        Ok(Self { listener, path: path.to_owned() })
    }

    /// Serves clients until the task is dropped.
    pub async fn serve(self, answerer: Arc<impl Answer>) {
        let places = Arc::new(Semaphore::new(MAX_CLIENTS));
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let answerer = Arc::clone(&answerer);
                    tokio::spawn(async move {
                        if let Err(error) = serve_one(stream, &*answerer).await {
                            tracing::debug!(%error, "control client gone before its answer");
                        }
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "control socket can't accept; trying again in 100 ms");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Whoever removed it before us did our work.
        let _ = fs::remove_file(&self.path);
    }
}

async fn serve_one(mut stream: UnixStream, answerer: &impl Answer) -> io::Result<()> {
    let reply = match timeout(REQUEST_TIMEOUT, read_request(&mut stream)).await {
        Ok(Ok(request)) => answerer.answer(request, Caller::of(&stream)?).await,
        Ok(Err(error)) => Reply::Error(format!("not a request: {error}")),
        Err(_) => Reply::Error(format!("no request within {REQUEST_TIMEOUT:?}")),
    };
    let mut line = serde_json::to_vec(&reply)?;
    line.push(b'\n');
    timeout(REQUEST_TIMEOUT, stream.write_all(&line)).await??;
    Ok(())
}

async fn read_request(stream: &mut UnixStream) -> io::Result<Request> {
    let mut line = Vec::new();
    tokio::io::BufReader::new(stream.take(MAX_REQUEST)).read_until(b'\n', &mut line).await?;
    if line.last() != Some(&b'\n') {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("one line of JSON, at most {MAX_REQUEST} bytes, is expected"),
        ));
    }
    Ok(serde_json::from_slice(&line)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo;

    impl Answer for Echo {
        async fn answer(&self, request: Request, _: Caller) -> Reply {
            Reply::ok(request)
        }
    }

    struct Served {
        _folder: tempfile::TempDir,
        path: PathBuf,
        task: tokio::task::JoinHandle<()>,
    }

    fn served() -> Served {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("run/control.sock");
        let socket = Socket::bind(&path).expect("bound");
        let task = tokio::spawn(socket.serve(Arc::new(Echo)));
        Served { _folder: folder, path, task }
    }

    async fn raw(path: &Path, bytes: &'static [u8]) -> Reply {
        let mut stream = UnixStream::connect(path).await.expect("connected");
        stream.write_all(bytes).await.expect("written");
        stream.shutdown().await.expect("shut");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.expect("answered");
        serde_json::from_slice(&answer).expect("a reply")
    }

    async fn asked(path: &Path, request: Request) -> Result<Reply, AskError> {
        let path = path.to_owned();
        tokio::task::spawn_blocking(move || ask(&path, &request, Duration::from_secs(5)))
            .await
            .expect("no panic")
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_request_is_answered() {
        let served = served();
        let request = Request::SetBackend {
            backend: "socks/dante1".into(),
            admin: crate::pool::Admin::Drained,
        };
        let reply = asked(&served.path, request.clone()).await.expect("answered");
        assert_eq!(reply, Reply::ok(request));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_no_request_gets_an_error_and_the_socket_goes_on() {
        let served = served();
        let hostile: [&[u8]; 6] = [
            b"",
            b"\n",
            b"\"status\"",
            b"\"format-disk\"\n",
            b"{\"set-backend\":{\"backend\":\"a\",\"admin\":\"drained\",\"also\":1}}\n",
            b"\xff\xfe\x00\n",
        ];
        for bytes in hostile {
            let reply = raw(&served.path, bytes).await;
            assert!(matches!(&reply, Reply::Error(why) if why.starts_with("not a request")));
        }
        let reply = asked(&served.path, Request::Status).await.expect("answered");
        assert_eq!(reply, Reply::ok(Request::Status));
    }

    #[test]
    fn an_endless_answer_is_left_at_the_bound() {
        let (ours, mut theirs) = StdUnixStream::pair().expect("a pair");
        let answering = std::thread::spawn(move || {
            let spaces = vec![b' '; 1 << 20];
            for _ in 0..=MAX_ANSWER >> 20 {
                theirs.write_all(&spaces)?;
            }
            theirs.write_all(b"{\"ok\":null}\n")
        });
        let answer = exchange(ours, &Request::Status, Duration::from_secs(20));
        assert!(answer.is_err(), "{answer:?}");
        assert!(answering.join().expect("no panic").is_err(), "nobody reads the rest");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_socket_is_for_its_owner_and_is_removed() {
        let served = served();
        let mode = fs::metadata(&served.path).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(matches!(Socket::bind(&served.path), Err(BindError::InUse(_))));
        served.task.abort();
        let _ = served.task.await;
        assert!(!served.path.exists());
        assert!(matches!(
            asked(&served.path, Request::Status).await,
            Err(AskError::Unreachable { .. })
        ));
    }

    #[tokio::test]
    async fn a_dead_daemons_socket_is_replaced_and_a_file_is_not() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("control.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).expect("bound"));
        assert!(path.exists());
        Socket::bind(&path).expect("replaced");
        fs::write(&path, "precious").expect("written");
        assert!(matches!(Socket::bind(&path), Err(BindError::NotASocket(_))));
        assert_eq!(fs::read_to_string(&path).expect("kept"), "precious");
    }
}
