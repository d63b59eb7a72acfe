//! Hooks of the comparisons that a target's code makes, which do nothing.
//!
//! libFuzzer's own remember the operands, so that mutations can bring about what an input is compared
//! with. A target that takes its choices from single bytes has no use for that, and spends half of
//! its time in it: its binary includes this file, whose symbols the linker then takes instead
//! (`build.rs` allows it). Edges are counted as ever.

macro_rules! hooks {
    ($($name:ident($($argument:ty),*);)*) => {
        $(
            // The compiler calls these, by their names.
            #[unsafe(no_mangle)]
            extern "C" fn $name($(_: $argument),*) {}
        )*
    };
}

hooks! {
    __sanitizer_cov_trace_cmp1(u8, u8);
    __sanitizer_cov_trace_cmp2(u16, u16);
    __sanitizer_cov_trace_cmp4(u32, u32);
    __sanitizer_cov_trace_cmp8(u64, u64);
    __sanitizer_cov_trace_const_cmp1(u8, u8);
    __sanitizer_cov_trace_const_cmp2(u16, u16);
    __sanitizer_cov_trace_const_cmp4(u32, u32);
    __sanitizer_cov_trace_const_cmp8(u64, u64);
    __sanitizer_cov_trace_switch(u64, *mut u64);
}
