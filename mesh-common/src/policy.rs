//! The one decision about plaintext that reaches a workload, asked by the kernel (`sk_lookup`) and by the daemon.

/// A workload's (or port's) mutual-TLS mode.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mode {
    /// Not meshed: neither captured nor guarded.
    Disabled = 0,
    /// Mutual TLS where the peer can, plaintext admitted.
    Permissive = 1,
    /// Mutual TLS only.
    Strict = 2,
}

impl Mode {
    /// Reads a mode back from a map; a number this version does not know is the safest mode.
    #[inline(always)]
    #[must_use]
    pub const fn from_number(number: u32) -> Self {
        match number {
            0 => Self::Disabled,
            1 => Self::Permissive,
            _ => Self::Strict,
        }
    }
}

/// How a new connection to a workload arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// The workload itself: remote and local address are the same.
    SelfTraffic,
    /// The daemon, delivering a connection whose peer it has authenticated.
    Authenticated,
    /// Anyone else, in plaintext, for an application port.
    Plaintext,
    /// Anyone else, for the port of the daemon's in-pod listener.
    MeshPort,
}

#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Pass,
    Drop,
}

/// Decides whether a new connection may reach a workload in `mode`. `None` is an address that is not in the mesh.
#[inline(always)]
pub const fn decide(mode: Option<Mode>, arrival: Arrival) -> Verdict {
    match (mode, arrival) {
        (_, Arrival::SelfTraffic | Arrival::Authenticated)
        | (None | Some(Mode::Disabled), _)
        | (Some(Mode::Permissive), Arrival::Plaintext) => Verdict::Pass,
        (Some(Mode::Permissive | Mode::Strict), Arrival::MeshPort) | (Some(Mode::Strict), Arrival::Plaintext) => {
            Verdict::Drop
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strict_admits_only_authenticated_and_self_traffic() {
        assert_eq!(decide(Some(Mode::Strict), Arrival::Plaintext), Verdict::Drop);
        assert_eq!(decide(Some(Mode::Strict), Arrival::MeshPort), Verdict::Drop);
        assert_eq!(decide(Some(Mode::Strict), Arrival::Authenticated), Verdict::Pass);
        assert_eq!(decide(Some(Mode::Strict), Arrival::SelfTraffic), Verdict::Pass);
    }

    #[test]
    fn permissive_admits_plaintext_but_never_the_mesh_port() {
        assert_eq!(decide(Some(Mode::Permissive), Arrival::Plaintext), Verdict::Pass);
        assert_eq!(decide(Some(Mode::Permissive), Arrival::MeshPort), Verdict::Drop);
    }

    #[test]
    fn what_is_not_in_the_mesh_is_left_alone() {
        for arrival in [Arrival::SelfTraffic, Arrival::Authenticated, Arrival::Plaintext, Arrival::MeshPort] {
            assert_eq!(decide(None, arrival), Verdict::Pass);
            assert_eq!(decide(Some(Mode::Disabled), arrival), Verdict::Pass);
        }
    }

    #[test]
    fn an_unknown_mode_is_read_as_strict() {
        assert_eq!(Mode::from_number(77), Mode::Strict);
        for mode in [Mode::Disabled, Mode::Permissive, Mode::Strict] {
            assert_eq!(Mode::from_number(mode as u32), mode);
        }
    }
}
