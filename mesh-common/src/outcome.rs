//! Every outcome of every hook, as the kernel counts it (`OUTCOMES`, per CPU) and as people read it.

macro_rules! outcomes {
    ($( $(#[$meta:meta])* $variant:ident = $index:literal, $hook:literal, $reason:literal, $verdict:literal, $text:literal; )*) => {
        /// The index of a per-CPU counter in `OUTCOMES`.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Outcome {
            $( $(#[$meta])* $variant = $index, )*
        }

        impl Outcome {
            pub const ALL: &'static [Self] = &[$( Self::$variant, )*];

            /// The hook that counts it: `connect`, `getpeername`, `sock_ops` or `sk_lookup`.
            #[must_use]
            pub const fn hook(self) -> &'static str {
                match self { $( Self::$variant => $hook, )* }
            }

            /// The value of the `reason` label; stable.
            #[must_use]
            pub const fn reason(self) -> &'static str {
                match self { $( Self::$variant => $reason, )* }
            }

            /// The value of the `verdict` label: `pass`, `capture`, `refuse`, `drop` or `error`.
            #[must_use]
            pub const fn verdict(self) -> &'static str {
                match self { $( Self::$variant => $verdict, )* }
            }

            /// One sentence for people.
            #[must_use]
            pub const fn describe(self) -> &'static str {
                match self { $( Self::$variant => $text, )* }
            }
        }
    };
}

outcomes! {
    ConnectNotWorkload = 0, "connect", "not_workload", "pass",
        "the caller's network namespace is no meshed workload of this node";
    ConnectOwn = 1, "connect", "own_mark", "pass", "the daemon's own connection";
    ConnectLoopback = 2, "connect", "loopback", "pass", "the destination is loopback or unspecified";
    ConnectSelf = 3, "connect", "self", "pass", "the workload called its own address";
    ConnectUnmeshed = 4, "connect", "unmeshed", "pass", "the destination is not in the mesh";
    ConnectExcluded = 5, "connect", "excluded", "pass", "the destination is in a range excluded by MeshConfig";
    ConnectProtocol = 6, "connect", "protocol", "pass", "the socket is not TCP";
    ConnectFailOpen = 7, "connect", "fail_open", "pass",
        "the daemon's heartbeat is stale and the workload fails open: connected directly, without mTLS";
    ConnectCaptured = 8, "connect", "captured", "capture", "redirected to the daemon's listener in the workload's namespace";
    ConnectNoEndpoints = 9, "connect", "no_endpoints", "refuse",
        "the service is known and has no endpoint: ECONNREFUSED";
    ConnectDaemonDown = 10, "connect", "daemon_down", "refuse",
        "the daemon's heartbeat is stale and the workload fails closed: ECONNREFUSED";
    ConnectNoAddress = 11, "connect", "no_address", "refuse",
        "the workload has no address of the socket's family to redirect to: EADDRNOTAVAIL";
    ConnectStorageFull = 12, "connect", "storage_full", "refuse",
        "no memory to record the original destination: ECONNREFUSED";
    TupleRecorded = 13, "sock_ops", "recorded", "capture", "the connection's original destination was handed to the daemon";
    TupleLost = 14, "sock_ops", "tuple_error", "error",
        "the original destination could not be recorded; the daemon will reset the connection";
    EventEmitted = 15, "sock_ops", "event_emitted", "pass", "a close record was written to the ring buffer";
    EventLost = 16, "sock_ops", "event_lost", "error", "the ring buffer was full: a close record is lost";
    PeernameRewritten = 17, "getpeername", "rewritten", "capture", "getpeername() answered with the original destination";
    LookupNotTcp = 18, "sk_lookup", "protocol", "pass", "not TCP";
    LookupSelf = 19, "sk_lookup", "self", "pass", "the workload called itself";
    LookupBypass = 20, "sk_lookup", "authenticated", "pass", "the daemon delivers an authenticated connection";
    LookupUnknown = 21, "sk_lookup", "unmeshed", "pass", "the local address is no meshed workload's";
    LookupPlaintext = 22, "sk_lookup", "plaintext", "pass", "plaintext from outside was admitted (PERMISSIVE)";
    LookupStrict = 23, "sk_lookup", "strict", "drop", "plaintext from outside was refused (STRICT)";
    LookupMeshPort = 24, "sk_lookup", "mesh_port", "drop", "something outside the workload dialled the daemon's in-pod listener";
    ConnectDenied = 25, "connect", "policy_denied", "refuse",
        "authorization policy does not allow the connection: EACCES, or ECONNREFUSED if MeshConfig says so";
    ConnectHanded = 26, "connect", "handed_socket", "refuse",
        "a host-network workload's socket was used by a process that is not of that workload: EACCES";
    LookupDenied = 27, "sk_lookup", "policy_denied", "drop", "authorization policy does not allow this plaintext";
    VerdictLost = 28, "policy", "event_lost", "error", "the ring buffer was half full: a verdict is counted and not named";
    OwnerLost = 29, "sock_create", "storage_full", "error",
        "no memory to record which host-network workload made a socket; its connects are refused";
    ConnectCarried = 30, "connect", "same_node", "pass",
        "sent straight to an endpoint on this node: the kernel carries it, under the caller's identity";
    FlowAdmitted = 31, "sock_ops", "admitted", "pass", "a connection that the kernel carries was admitted at its destination";
    AdmissionLost = 32, "sock_ops", "admission_error", "error",
        "a connection that the kernel carries could not be admitted: it arrives as plaintext";
    AdmissionEvicted = 33, "sock_ops", "admission_evicted", "error",
        "so many connections were carried by the kernel that the oldest were forgotten before their end";
    OpenLost = 34, "sock_ops", "open_lost", "error",
        "the ring buffer was half full: a connection that the kernel carries is told of when it ends, not before";
    LookupCarried = 35, "sk_lookup", "same_node", "pass",
        "a connection of a workload of this node, which the kernel has authenticated, was admitted";
    LookupCarriedDenied = 36, "sk_lookup", "same_node_denied", "drop",
        "authorization policy does not allow this connection of a workload of this node any more";
    DatagramNotWorkload = 37, "datagram", "not_workload", "pass",
        "the caller's network namespace is no workload of this node whose UDP is captured";
    DatagramOwn = 38, "datagram", "own_mark", "pass", "the daemon's own datagram";
    DatagramLoopback = 39, "datagram", "loopback", "pass", "the destination is loopback or unspecified";
    DatagramSelf = 40, "datagram", "self", "pass", "the workload called its own address";
    DatagramUnmeshed = 41, "datagram", "unmeshed", "pass", "the destination is no UDP port of the mesh";
    DatagramFailOpen = 42, "datagram", "fail_open", "pass",
        "the daemon's heartbeat is stale and the workload fails open: sent directly, in plaintext";
    DatagramConnected = 43, "datagram", "connected", "capture", "connect() of a UDP socket was redirected to the daemon";
    DatagramSent = 44, "datagram", "sent", "capture", "a datagram of an unconnected socket was redirected to the daemon";
    DatagramReplied = 45, "datagram", "replied", "capture",
        "an answer to a meshed caller was redirected to the daemon's socket for that caller";
    DatagramNoEndpoints = 46, "datagram", "no_endpoints", "refuse",
        "the service is known and has no endpoint: ECONNREFUSED";
    DatagramDaemonDown = 47, "datagram", "daemon_down", "refuse",
        "the daemon's heartbeat is stale and the workload fails closed: ECONNREFUSED";
    DatagramNoAddress = 48, "datagram", "no_address", "refuse",
        "the workload has no alias of the socket's family to redirect to: EADDRNOTAVAIL";
    DatagramStorageFull = 49, "datagram", "storage_full", "refuse",
        "no memory to record the original destination: ECONNREFUSED";
    DatagramDenied = 50, "datagram", "policy_denied", "refuse",
        "authorization policy does not allow the datagram: EACCES, or ECONNREFUSED if MeshConfig says so";
    AliasResolved = 51, "recvmsg", "rewritten", "capture", "a received datagram's source was shown as who it stands for";
    DatagramUnguarded = 52, "udp_lookup", "unguarded", "pass", "no UDP service leads to the local port";
    DatagramDelivered = 53, "udp_lookup", "authenticated", "pass", "the daemon delivers an authenticated datagram";
    DatagramSelfTraffic = 54, "udp_lookup", "self", "pass", "the workload called itself";
    DatagramPlaintext = 55, "udp_lookup", "plaintext", "pass", "a plaintext datagram from outside was admitted";
    DatagramStrict = 56, "udp_lookup", "strict", "drop", "a plaintext datagram from outside was refused (STRICT)";
    DatagramPolicy = 57, "udp_lookup", "policy_denied", "drop", "authorization policy does not allow this plaintext datagram";
    DatagramMeshPort = 58, "udp_lookup", "mesh_port", "drop", "a datagram was sent to the daemon's in-pod port itself";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_index_their_counters_without_gaps_and_labels_are_unique() {
        let mut labels = std::collections::BTreeSet::new();
        for (index, outcome) in Outcome::ALL.iter().enumerate() {
            assert_eq!(*outcome as usize, index);
            assert!(labels.insert((outcome.hook(), outcome.reason())), "{outcome:?} repeats a label");
            assert!(["pass", "capture", "refuse", "drop", "error"].contains(&outcome.verdict()));
            assert!(!outcome.describe().is_empty());
        }
    }
}
