use super::arena::Arena;
use super::chaos::Chaos;
use super::wire::Wire;
use super::Silence;
use crate::platform::Platform;
pub(super) fn visit<P: Platform>(_wire: &mut Wire<'_, P>, _chaos: &mut Chaos, _arena: &Arena<'_>) {}
pub(super) fn rest<P: Platform>(_wire: &mut Wire<'_, P>) -> Result<(), Silence> { Ok(()) }
