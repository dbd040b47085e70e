//! Sends bytes (may be none) and reads until the answer contains others.

use tokio::io::{AsyncRead, AsyncWrite};

use super::{ProbeError, Progress, Talk, printable};

/// Bytes read of an answer.
const ANSWER: usize = 64 * 1024;

/// Sends `send`, then waits for `expect`, which may be empty: then a connection that takes what
/// is sent is enough.
pub(super) async fn converse<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    send: &[u8],
    expect: &[u8],
    progress: &Progress,
) -> Result<(), ProbeError> {
    let mut talk = Talk::new(stream, progress, ANSWER);
    if !send.is_empty() {
        talk.send(send, "connected, text sent").await?;
    }
    let mut answer = Vec::new();
    let mut start: Option<String> = None;
    while !contains(&answer, expect) {
        // Only what may be the beginning of a match that goes on is kept.
        answer.drain(..answer.len().saturating_sub(expect.len() - 1));
        match talk.receive_some(&mut answer).await {
            Ok(()) => {}
            Err(ProbeError::Closed { .. } | ProbeError::Answer(_)) if start.is_some() => {
                let seen = start.unwrap_or_default();
                return Err(ProbeError::Answer(format!(
                    "{} is not in the answer, which begins {seen}",
                    printable(expect)
                )));
            }
            Err(error) => return Err(error),
        }
        start.get_or_insert_with(|| printable(&answer));
        progress.reach(match send {
            [] => "connected, something else was received",
            _ => "connected, text sent, something else was received",
        });
    }
    Ok(())
}

fn contains(answer: &[u8], expect: &[u8]) -> bool {
    expect.is_empty() || answer.windows(expect.len()).any(|window| window == expect)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Canned, at_once};
    use super::*;
    use proptest::prelude::*;

    fn judge(answer: &[u8], expect: &[u8], piece: usize) -> (Result<(), String>, usize) {
        let mut canned = Canned::new(answer, piece);
        let progress = Progress::default();
        let result = at_once(converse(&mut canned, b"PING\n", expect, &progress));
        (result.map_err(|error| error.to_string()), canned.read)
    }

    #[test]
    fn the_text_is_found_wherever_it_is_cut() {
        let answer = b"220 +PO +PON +PONG\r\n";
        for piece in 1..=answer.len() {
            assert_eq!(judge(answer, b"+PONG", piece).0, Ok(()), "in {piece}");
        }
        assert_eq!(judge(b"", b"", 1), (Ok(()), 0));
        let error = judge(b"-ERR", b"+PONG", 4).0.expect_err("not there");
        assert_eq!(error, r#""+PONG" is not in the answer, which begins "-ERR""#);
        let error = judge(b"", b"+PONG", 4).0.expect_err("not there");
        assert_eq!(error, "closed before the answer was complete (connected, text sent)");
    }

    #[test]
    fn an_endless_answer_is_left_at_the_bound() {
        let (result, read) = judge(&vec![b'.'; 2 * ANSWER], b"+PONG", 4096);
        assert!(result.expect_err("no end").contains("is not in the answer"));
        assert_eq!(read, ANSWER);
    }

    proptest! {
        #[test]
        fn found_just_where_it_is(
            answer in prop::collection::vec(0u8..3, 0..200),
            expect in prop::collection::vec(0u8..3, 0..6),
            piece in 1usize..50,
        ) {
            let (result, read) = judge(&answer, &expect, piece);
            prop_assert_eq!(result.is_ok(), contains(&answer, &expect));
            prop_assert!(read <= ANSWER);
        }

        #[test]
        fn no_answer_is_too_strange(
            answer in prop::collection::vec(any::<u8>(), 0..2000),
            expect in prop::collection::vec(any::<u8>(), 1..2000),
            repeat in 1usize..80,
        ) {
            prop_assert!(judge(&answer.repeat(repeat), &expect, 2048).1 <= ANSWER);
        }
    }
}
