//! `gnomon doctor` stand-in
pub(crate) fn run(_args: &super::args::DoctorArgs) -> anyhow::Result<u8> {
    Ok(0)
}
