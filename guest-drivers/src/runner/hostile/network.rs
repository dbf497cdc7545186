use super::arena::Arena;
use super::chaos::Chaos;
use super::wire::{Wire, Offer};
use crate::platform::Platform;
pub(super) fn visit<'w, P: Platform>(_wire: &mut Wire<'w, P>, _chaos: &mut Chaos, _arena: &Arena<'w>, _offer: Offer, _depth: usize) {}
