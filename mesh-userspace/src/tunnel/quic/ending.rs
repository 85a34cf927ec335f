//! Why a connection has ended.

use crate::identity::PeerRefusal;
use crate::tunnel::OpenError;
use quinn::ConnectionError;

/// The refusal of either side's TLS in a connection's end, if that is what it was.
pub(super) fn lost(error: &ConnectionError) -> Option<OpenError> {
    let timed_out = matches!(error, ConnectionError::TimedOut).then_some(OpenError::Timeout);
    refusal(error).map(OpenError::Handshake).or(timed_out)
}

/// TLS alerts are QUIC transport errors 0x100 + alert.
pub(super) fn refusal(error: &ConnectionError) -> Option<PeerRefusal> {
    let code = match error {
        ConnectionError::TransportError(error) => error.code,
        ConnectionError::ConnectionClosed(close) => close.error_code,
        _ => return None,
    };
    let alert = u8::try_from(u64::from(code).checked_sub(0x100)?).ok()?;
    Some(PeerRefusal::from(&rustls::Error::AlertReceived(rustls::AlertDescription::from(alert))))
}

pub(super) fn closed_reason(error: &ConnectionError) -> &'static str {
    if let Some(refusal) = refusal(error) {
        return refusal.reason();
    }
    match error {
        ConnectionError::LocallyClosed => "local",
        ConnectionError::ApplicationClosed(_) | ConnectionError::ConnectionClosed(_) => "peer_closed",
        ConnectionError::TimedOut => "silent",
        ConnectionError::TransportError(_) | ConnectionError::VersionMismatch => "protocol",
        ConnectionError::Reset => "io",
        ConnectionError::CidsExhausted => "bound",
    }
}
