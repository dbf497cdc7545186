//! The channels of the bus: which there are, and how far each has come.

use std::collections::BTreeMap;

use vmbus::protocol::{GpadlId, Relid};

use crate::channel::OfferParams;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Closed,
    /// A worker is being started; its answer is owed to the guest unless it has gone.
    Opening {
        open_id: u32,
        ring: GpadlId,
        close: bool,
    },
    Open {
        ring: GpadlId,
    },
    /// A worker is being stopped.
    Closing {
        ring: GpadlId,
    },
}

#[derive(Debug)]
pub(super) struct Channel {
    pub(super) params: OfferParams,
    /// The first channel of the same device, if this is a sub-channel.
    pub(super) primary: Option<Relid>,
    pub(super) subchannel: u16,
    pub(super) state: State,
    /// The guest knows of it.
    pub(super) offered: bool,
    /// The offer is withdrawn.
    pub(super) rescinded: bool,
    /// The guest is to hear that once the worker has stopped: it may reuse the ring then.
    pub(super) untold: bool,
    /// The guest has let go of the withdrawn offer.
    pub(super) released: bool,
}

/// All channels, by their numbers.
#[derive(Debug, Default)]
pub(super) struct Channels {
    by_relid: BTreeMap<Relid, Channel>,
    /// The number that was given out last.
    last: u32,
}

impl Channels {
    /// Adds a channel that the guest does not know of. `None` if there are no numbers left.
    pub(super) fn add(
        &mut self,
        params: OfferParams,
        primary: Option<Relid>,
        subchannel: u16,
    ) -> Option<Relid> {
        // Round and round, so that a number rests before it is used again.
        let (after, before) = (self.last + 1..=Relid::MAX.0, 1..=self.last.min(Relid::MAX.0));
        let relid = after.chain(before).map(Relid).find(|r| !self.by_relid.contains_key(r))?;
        self.last = relid.0;
        self.by_relid.insert(
            relid,
            Channel {
                params,
                primary,
                subchannel,
                state: State::Closed,
                offered: false,
                rescinded: false,
                untold: false,
                released: false,
            },
        );
        Some(relid)
    }

    pub(super) fn get(&self, relid: Relid) -> Option<&Channel> {
        self.by_relid.get(&relid)
    }

    pub(super) fn get_mut(&mut self, relid: Relid) -> Option<&mut Channel> {
        self.by_relid.get_mut(&relid)
    }

    /// Forgets a channel. Its number may be given out again.
    pub(super) fn remove(&mut self, relid: Relid) {
        self.by_relid.remove(&relid);
    }

    /// Forgets those that `keep` does not want, after it has changed what it likes.
    pub(super) fn retain(&mut self, mut keep: impl FnMut(&mut Channel) -> bool) {
        self.by_relid.retain(|_, channel| keep(channel));
    }

    /// The numbers of all.
    pub(super) fn relids(&self) -> Vec<Relid> {
        self.by_relid.keys().copied().collect()
    }

    /// The sub-channels of a device, those that are withdrawn left out.
    pub(super) fn subchannels(&self, primary: Relid) -> Vec<Relid> {
        let ours = |c: &Channel| c.primary == Some(primary) && !c.rescinded;
        self.by_relid.iter().filter(|(_, c)| ours(c)).map(|(relid, _)| *relid).collect()
    }

    /// Whether neither a channel nor a sub-channel of it has a worker, or is about to: the worker of one
    /// may use what is the other's.
    pub(super) fn is_idle(&self, relid: Relid) -> bool {
        let busy = |channel: &Channel| channel.state != State::Closed;
        let own = self.get(relid).is_some_and(busy);
        !own && !self
            .by_relid
            .values()
            .any(|channel| channel.primary == Some(relid) && busy(channel))
    }

    /// Whether any has a worker, or is about to.
    pub(super) fn are_busy(&self) -> bool {
        self.by_relid.values().any(|channel| channel.state != State::Closed)
    }
}
