//! Whether this node reaches its gateway: asked again and again, believed only after several
//! answers or silences in a row.
//!
//! Pure: it says when whom to ask, and is told of answers. How one asks (ARP, neighbour discovery)
//! is the driver's business; what follows from it is [`crate::heart`]'s, since a gateway that no
//! node reaches is nobody's fault.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Between two questions.
pub const PROBE_INTERVAL: Duration = Duration::from_millis(200);

/// Questions in a row without any answer until the gateway counts as lost.
pub const FALL: u32 = 3;

/// Questions in a row that were answered until it counts as reached again: longer, so that a
/// gateway that comes and goes moves nothing.
pub const RISE: u32 = 10;

/// Most gateways that are asked.
pub const MOST: usize = 8;

/// What is known of a node's gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, wincode::SchemaRead, wincode::SchemaWrite)]
#[cfg_attr(test, derive(bincode::Encode, bincode::Decode))]
pub enum Reach {
    /// None is configured, or nothing is known yet.
    #[default]
    Unknown,
    /// It answers.
    Reached,
    /// It does not.
    Lost,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// Ask this address.
    Ask(IpAddr),
    /// From now on.
    Reach(Reach),
}

/// The watch on one or more gateways; with several, any of them is enough.
#[derive(Debug)]
pub struct Watch {
    gateways: Vec<IpAddr>,
    reach: Reach,
    ask_at: Option<Instant>,
    /// Whether the last question was answered; `None` before the first.
    answered: Option<bool>,
    /// Questions in a row whose outcome speaks against `reach`.
    against: u32,
    outputs: VecDeque<Output>,
}

impl Watch {
    /// A watch that begins at once; without gateways it never does anything.
    pub fn new(now: Instant, gateways: Vec<IpAddr>) -> Self {
        Self {
            ask_at: (!gateways.is_empty()).then_some(now),
            gateways,
            reach: Reach::Unknown,
            answered: None,
            against: 0,
            outputs: VecDeque::new(),
        }
    }

    /// What is known.
    pub fn reach(&self) -> Reach {
        self.reach
    }

    /// Somebody has answered for this address; others than gateways don't matter.
    pub fn answer(&mut self, from: IpAddr) {
        if self.gateways.contains(&from) {
            self.answered = self.answered.map(|_| true);
        }
    }

    /// Asks, where that is due. After a sleep only one question is judged.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.ask_at.is_none_or(|at| at > now) {
            return;
        }
        self.ask_at = Some(now + PROBE_INTERVAL);
        if let Some(answered) = self.answered.replace(false) {
            self.judge(answered);
        }
        self.outputs.extend(self.gateways.iter().copied().map(Output::Ask));
    }

    /// When [`Watch::handle_timeout`] is wanted next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.ask_at
    }

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    fn judge(&mut self, answered: bool) {
        let (verdict, needed) = match (self.reach, answered) {
            (Reach::Reached, true) | (Reach::Lost, false) => {
                self.against = 0;
                return;
            }
            (Reach::Unknown, true) => (Reach::Reached, 1),
            (Reach::Unknown | Reach::Reached, false) => (Reach::Lost, FALL),
            (Reach::Lost, true) => (Reach::Reached, RISE),
        };
        self.against += 1;
        if self.against >= needed {
            self.against = 0;
            self.reach = verdict;
            self.outputs.push_back(Output::Reach(verdict));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GATEWAYS: [IpAddr; 2] = [
        IpAddr::V4(std::net::Ipv4Addr::new(10, 77, 0, 1)),
        IpAddr::V4(std::net::Ipv4Addr::new(10, 77, 0, 254)),
    ];

    /// Questions, each answered by that gateway or by none; the verdicts with their number.
    fn verdicts(answers: &[Option<IpAddr>]) -> Vec<(usize, Reach)> {
        let mut now = Instant::now();
        let mut watch = Watch::new(now, GATEWAYS.to_vec());
        let mut verdicts = Vec::new();
        for (number, answer) in answers.iter().chain([&None]).enumerate() {
            assert_eq!(watch.poll_timeout(), Some(now));
            watch.handle_timeout(now);
            let mut asked = Vec::new();
            while let Some(output) = watch.poll_output() {
                match output {
                    Output::Ask(gateway) => asked.push(gateway),
                    Output::Reach(reach) => verdicts.push((number, reach)),
                }
            }
            assert_eq!(asked, GATEWAYS, "every gateway is asked each time");
            if let Some(from) = answer {
                watch.answer(*from);
            }
            now += PROBE_INTERVAL;
        }
        verdicts
    }

    #[test]
    fn several_silences_lose_it_and_more_answers_bring_it_back() {
        let (first, second) = (Some(GATEWAYS[0]), Some(GATEWAYS[1]));
        assert_eq!(verdicts(&[first]), [(1, Reach::Reached)], "the first answer is believed");
        assert_eq!(verdicts(&[None; 3]), [(3, Reach::Lost)]);
        assert_eq!(verdicts(&[first, None, None, second, None, None]), [(1, Reach::Reached)]);
        let mut long = vec![first, None, None, None];
        long.extend([second; 9]);
        assert_eq!(verdicts(&long), [(1, Reach::Reached), (4, Reach::Lost)], "nine are too few");
        long.extend([None, first]);
        assert_eq!(verdicts(&long).len(), 2, "and they have to be in a row");
        long.extend([first; 9]);
        assert_eq!(verdicts(&long)[2..], [(24, Reach::Reached)]);
    }

    #[test]
    fn what_others_answer_does_not_count() {
        let stranger = Some(IpAddr::from([10, 77, 0, 9]));
        assert_eq!(verdicts(&[stranger; 3]), [(3, Reach::Lost)]);
    }

    #[test]
    fn an_answer_before_the_first_question_and_a_sleep_prove_nothing() {
        let now = Instant::now();
        let mut watch = Watch::new(now, GATEWAYS.to_vec());
        watch.answer(GATEWAYS[0]);
        watch.handle_timeout(now);
        assert_eq!(watch.reach(), Reach::Unknown);
        watch.handle_timeout(now + 100 * PROBE_INTERVAL);
        assert_eq!(watch.against, 1, "one question was open");
        assert_eq!(Watch::new(now, Vec::new()).poll_timeout(), None);
    }
}
