//! What every type that crosses the kernel/user border has in common.

/// Raised whenever a map key, value or record changes its layout or meaning. The daemon writes it to
/// [`crate::maps::CfgSlot::AbiVersion`]; a daemon that finds pinned maps of another version replaces them instead of
/// adopting them.
pub const ABI_VERSION: u32 = 3;

/// Declares a type that lives in a BPF map: `repr(C)`, private fields with getters, reserved bytes always zero, and a
/// compile-time proof that the compiler added no padding (padding bytes would reach the kernel uninitialised, and the
/// verifier rejects reading them).
macro_rules! pod {
    (
        $(#[$meta:meta])*
        pub struct $name:ident [$size:literal] {
            $( $(#[$field_meta:meta])* $field:ident : $ty:ty, )*
            $( ; reserved $pad:ident : [u8; $pad_len:literal] )?
        }
    ) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name {
            $( $field: $ty, )*
            $( $pad: [u8; $pad_len], )?
        }

        const _: () = {
            assert!(core::mem::size_of::<$name>() == $size, "size differs from the declared one");
            assert!(
                0 $( + core::mem::size_of::<$ty>() )* $( + $pad_len )? == $size,
                "the compiler added padding"
            );
        };

        impl $name {
            #[inline(always)]
            #[must_use]
            #[allow(clippy::too_many_arguments, reason = "one argument a field: the record's own shape")]
            pub const fn new($( $field: $ty ),*) -> Self {
                Self { $( $field, )* $( $pad: [0; $pad_len], )? }
            }

            $(
                $(#[$field_meta])*
                #[inline(always)]
                #[must_use]
                pub const fn $field(&self) -> $ty {
                    self.$field
                }
            )*
        }

        #[cfg(feature = "user")]
        impl $name {
            /// Reads the record from the kernel's bytes; `None` if they are not as many as it has.
            #[must_use]
            pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
                // SAFETY: the size is checked and every bit pattern is valid, as said below.
                (bytes.len() == $size).then(|| unsafe { bytes.as_ptr().cast::<Self>().read_unaligned() })
            }
        }

        #[cfg(feature = "user")]
        // SAFETY: repr(C), integers and byte arrays only, and proven free of padding above: every bit pattern is valid.
        unsafe impl aya::Pod for $name {}
    };
}
pub(crate) use pod;
