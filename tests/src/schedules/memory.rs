//! What a member that does not answer costs the leader (tikv 15800, 19593).

use super::raft_alone::{C, F, L, l_leads};
use super::replica::{MAX_LOG_BYTES, Ours};
use super::stage::Stage;

const WIDTH: usize = 4 * 1024;

fn log_bytes(s: &Stage<Ours>, id: u64) -> usize {
    s.member(id).replica().log().iter().map(|(_, _, data)| data.len()).sum()
}

#[test]
fn a_stuck_follower_does_not_exhaust_the_leaders_memory() {
    let mut s = l_leads::<Ours>();
    s.release();
    s.cut(C);
    s.member_mut(L).width = WIDTH;
    let mut most = [0, 0];
    for n in 2..4_000 {
        s.write(L, n);
        if n % 10 == 0 {
            s.tick();
        }
        for (most, id) in most.iter_mut().zip([L, F]) {
            *most = log_bytes(&s, id).max(*most);
        }
    }
    assert_eq!(s.acknowledged, 3_999);
    let written = 4_000 * WIDTH;
    // What is cut goes at once and in steps (`LOG_CUT`, `LOG_MARGIN`), so a few hundred entries may stand beyond the bound.
    let bound = MAX_LOG_BYTES + 400 * WIDTH;
    assert!(most[0] > MAX_LOG_BYTES / 2, "the follower is kept in mind: {most:?}");
    assert!(most.iter().all(|m| *m < bound) && bound * 4 < written, "{most:?}");
    // It is back and cannot be helped, for want of snapshots; nobody is hurt by it.
    s.lift_all();
    s.ticks(30);
    s.write(L, 5_000);
    assert_eq!((s.acknowledged, s.leader(F), s.leader(C)), (5_000, L, L));
    assert!(s.member(C).replica().applied() < s.member(F).replica().applied());
    assert!(s.stale.is_empty() && s.overlaps.is_empty());
}
