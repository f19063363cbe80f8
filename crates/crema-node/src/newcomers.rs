//! Connections of which nothing is known yet: few of them, few of one host, and the next one always gets in.
//!
//! ```text
//!   accepted --admit--> Newcomer --dropped: it has shown what it is--> counted elsewhere, by whoever knows
//!                           \--- too many, or too many of its host: the oldest of them goes for the new one
//! ```
//!
//! Whoever means well shows what it is within milliseconds, so that the oldest is most likely one that never will. Refusing
//! the new one instead would let anybody who connects and says nothing keep everybody else out.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::future::pending;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::sync::oneshot;

/// The newcomers of one listener.
#[derive(Debug)]
pub(crate) struct Newcomers {
    most: usize,
    most_of_one: usize,
    here: Mutex<Here>,
}

#[derive(Debug, Default)]
struct Here {
    next: u64,
    /// By age: numbers are given in turn.
    all: BTreeMap<u64, (IpAddr, oneshot::Sender<()>)>,
    by_host: HashMap<IpAddr, BTreeSet<u64>>,
}

impl Here {
    fn remove(&mut self, number: u64) -> Option<oneshot::Sender<()>> {
        let (host, go) = self.all.remove(&number)?;
        if let Some(numbers) = self.by_host.get_mut(&host) {
            numbers.remove(&number);
            if numbers.is_empty() {
                self.by_host.remove(&host);
            }
        }
        Some(go)
    }
}

impl Newcomers {
    /// At most `most` of them, at most `most_of_one` of one host.
    pub(crate) fn new(most: usize, most_of_one: usize) -> Arc<Newcomers> {
        Arc::new(Newcomers { most, most_of_one, here: Mutex::default() })
    }

    /// Takes one in. If that is one too many, the oldest goes: of its own host, or of the one that has most.
    pub(crate) fn admit(self: &Arc<Self>, addr: IpAddr) -> (Newcomer, Expulsion) {
        let host = host_of(addr);
        let (go, told) = oneshot::channel();
        let mut here = self.lock();
        let crowd = match here.by_host.get(&host) {
            Some(own) if own.len() >= self.most_of_one => Some(own),
            // A host with few of them must not pay for one with many.
            _ if here.all.len() >= self.most => {
                here.by_host.values().max_by_key(|numbers| (numbers.len(), Reverse(numbers.first().copied())))
            }
            _ => None,
        };
        if let Some(oldest) = crowd.and_then(|numbers| numbers.first().copied()) {
            // If nobody listens any more, it is about to go anyway.
            let _ = here.remove(oldest).map(|go| go.send(()));
        }
        let number = here.next;
        here.next += 1;
        here.all.insert(number, (host, go));
        here.by_host.entry(host).or_default().insert(number);
        (Newcomer { newcomers: self.clone(), number }, Expulsion(told))
    }

    fn lock(&self) -> MutexGuard<'_, Here> {
        self.here.lock().expect("no panic while held")
    }
}

/// One connection's place among the newcomers. To be dropped once it has shown what it is, or is closed.
#[derive(Debug)]
pub(crate) struct Newcomer {
    newcomers: Arc<Newcomers>,
    number: u64,
}

impl Drop for Newcomer {
    fn drop(&mut self) {
        self.newcomers.lock().remove(self.number);
    }
}

/// Tells a connection that it has to go.
#[derive(Debug)]
pub(crate) struct Expulsion(oneshot::Receiver<()>);

impl Expulsion {
    /// Waits until the connection has to go for a newer one; for ever once it is no newcomer any more.
    pub(crate) async fn told(self) {
        if self.0.await.is_err() {
            pending::<()>().await;
        }
    }
}

/// What counts as one host: an IPv6 host has a whole network of 64 bits to connect from.
fn host_of(addr: IpAddr) -> IpAddr {
    match addr.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64).into(),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addr(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// Who of them has been told to go.
    fn gone(all: &mut [(Newcomer, Expulsion)]) -> Vec<usize> {
        let told = all.iter_mut().enumerate().filter_map(|(i, (_, told))| told.0.try_recv().is_ok().then_some(i));
        told.collect()
    }

    #[test]
    fn the_oldest_of_a_host_goes_when_it_has_too_many() {
        let newcomers = Newcomers::new(100, 2);
        let mut all: Vec<_> =
            ["10.0.0.1", "10.0.0.2", "10.0.0.1", "::ffff:10.0.0.1"].map(|a| newcomers.admit(addr(a))).into();
        assert_eq!(gone(&mut all), [0]);
        all.push(newcomers.admit(addr("10.0.0.1")));
        assert_eq!(gone(&mut all), [2]);
        // Whoever has shown what it is takes no place and is not told.
        drop(all.remove(3));
        all.push(newcomers.admit(addr("10.0.0.1")));
        assert_eq!(gone(&mut all), [0_usize; 0]);
        // A host of IPv6 has many addresses.
        let mut all: Vec<_> =
            ["fd00::1", "fd00::2", "fd00:0:0:1::1", "fd00::3"].map(|a| newcomers.admit(addr(a))).into();
        assert_eq!(gone(&mut all), [0]);
    }

    #[test]
    fn when_there_are_too_many_of_all_the_host_with_most_pays() {
        let newcomers = Newcomers::new(5, 4);
        let hosts = ["10.0.0.1", "10.0.0.2", "10.0.0.2", "10.0.0.3", "10.0.0.3"];
        let mut all: Vec<_> = hosts.map(|a| newcomers.admit(addr(a))).into();
        assert_eq!(gone(&mut all), [0_usize; 0]);
        // The oldest of all is alone of its host; of two hosts with two each, the one with the older goes first.
        for (from, told) in [("10.0.0.4", 1), ("10.0.0.5", 3), ("10.0.0.6", 0)] {
            all.push(newcomers.admit(addr(from)));
            assert_eq!(gone(&mut all), [told], "{from}");
        }
        drop(all);
        assert!(newcomers.lock().all.is_empty() && newcomers.lock().by_host.is_empty());
    }

    #[tokio::test]
    async fn only_newcomers_are_told_to_go() {
        let newcomers = Newcomers::new(1, 1);
        let (first, told) = newcomers.admit(addr("10.0.0.1"));
        let (second, told_second) = newcomers.admit(addr("10.0.0.2"));
        told.told().await;
        drop((first, second));
        let (_third, _) = newcomers.admit(addr("10.0.0.3"));
        let mut told_second = Box::pin(told_second.told());
        assert!(std::future::poll_fn(|c| std::task::Poll::Ready(told_second.as_mut().poll(c))).await.is_pending());
    }
}
