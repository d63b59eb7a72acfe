use super::*;
use crate::host_mm::HostMmConfig;

fn run_test_guest(cmdline: &str, vcpus: usize, memory: u64, host: u64) -> (Outcome, String) {
    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);
    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            lock(&self.0).extend_from_slice(bytes);
            let _ = std::io::stderr().write_all(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mm = HostMm::new(HostMmConfig::new(host)).unwrap();
    mm.start_background_reclaim().unwrap();
    let console = Kept::default();
    let config = VmConfig {
        memory_bytes: memory,
        vcpus,
        kernel: Cow::Borrowed(boot::TEST_GUEST),
        cmdline: cmdline.to_owned(),
        shadow_pages: None,
        observer: None,
    };
    let mut vm = Vm::new(&config, &mm, Box::new(console.clone())).unwrap();
    vm.start().unwrap();
    let outcome = vm.wait(Some(Duration::from_secs(60)));
    eprintln!("{:?} {:?} {:?}", vm.counts(), vm.guest_counters(), vm.violations());
    eprintln!("{:?}", vm.shadow().stats());
    let outcome = outcome.unwrap_or_else(|| {
        vm.kill();
        vm.wait(None).unwrap()
    });
    if let Some(h) = vm.fault_latency().read.histogram() {
        eprintln!(
            "read p50 {} p99 {} max {}",
            h.value_at_quantile(0.5),
            h.value_at_quantile(0.99),
            h.max()
        );
    }
    let text = String::from_utf8_lossy(&lock(&console.0)).into_owned();
    (outcome, text)
}

#[test]
fn smoke() {
    let (outcome, _) = run_test_guest("", 1, 64 << 20, 128 << 20);
    panic!("{outcome:?}");
}
