//! Trees of plain files that look like control groups.

use super::*;

struct Tree(tempfile::TempDir);

impl Tree {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn put(&self, group: &str, files: &[(&str, &str)]) {
        let folder = self.0.path().join(group);
        fs::create_dir_all(&folder).unwrap();
        for (name, content) in files {
            fs::write(folder.join(name), format!("{content}\n")).unwrap();
        }
    }

    /// A line of mountinfo.
    fn mount(&self, root: &str, kind: &str, options: &str) -> String {
        let place = self.0.path().display();
        format!("31 23 0:26 {root} {place} rw,nosuid shared:9 - {kind} {kind} {options}\n")
    }

    fn limit(&self, file: &str, limit: u64, used: u64) -> GroupLimit {
        GroupLimit { file: self.0.path().join(file), limit, used }
    }
}

#[test]
fn all_ancestors_of_version_2_count() {
    let tree = Tree::new();
    let stat = (
        "memory.stat",
        "anon 5\ninactive_file 30\nactive_file 12\nfile 99\nslab_reclaimable 7\nslab_unreclaimable 6\nslab 13",
    );
    tree.put("", &[("cgroup.procs", "")]);
    tree.put(
        "a",
        &[("memory.max", "4096"), ("memory.high", "max"), ("memory.current", "100"), stat],
    );
    tree.put(
        "a/b",
        &[("memory.max", "max"), ("memory.high", "2048"), ("memory.current", "80"), stat],
    );
    tree.put("a/b", &[("pids.max", "7"), ("pids.current", "3")]);
    tree.put("a/b/c", &[("memory.max", "max"), ("memory.high", "max"), ("memory.current", "9")]);
    let groups = Groups::of("0::/a/b/c\n", &tree.mount("/", "cgroup2", "rw"));
    let expected = [tree.limit("a/b/memory.high", 2048, 31), tree.limit("a/memory.max", 4096, 51)];
    assert_eq!(groups.memory, expected);
    assert_eq!(groups.pids, [tree.limit("a/b/pids.max", 7, 3)]);
    assert_eq!(groups.pids[0].room(), 4);
    assert!(!groups.has_hidden_ancestors);
}

#[test]
fn version_1_tells_the_least_of_all_ancestors() {
    let tree = Tree::new();
    let none = ("memory.limit_in_bytes", "9223372036854771712");
    tree.put("", &[none, ("memory.usage_in_bytes", "500")]);
    tree.put("a", &[("memory.limit_in_bytes", "8192"), ("memory.usage_in_bytes", "700")]);
    let stat = "hierarchical_memory_limit 4096\ntotal_inactive_file 100\ntotal_active_file 1";
    tree.put("a/b", &[none, ("memory.usage_in_bytes", "600"), ("memory.stat", stat)]);
    let memberships = "9:name=systemd:/a/b\n4:cpu,memory:/a/b\n0::/\n";
    let mount = tree.mount("/", "cgroup", "rw,cpu,memory");
    let groups = Groups::of(memberships, &mount);
    let expected =
        [tree.limit("a/memory.limit_in_bytes", 8192, 700), tree.limit("a/b/memory.stat", 4096, 0)];
    assert_eq!(groups.memory, expected);
    // A parent that does not count its children.
    tree.put("a", &[("memory.use_hierarchy", "0")]);
    assert_eq!(Groups::of(memberships, &mount).memory, expected[1..]);
}

#[test]
fn a_container_sees_its_own_part_and_says_so() {
    let tree = Tree::new();
    tree.put("", &[("memory.max", "4096"), ("memory.current", "10")]);
    tree.put("inner", &[("memory.max", "1024"), ("memory.current", "5")]);
    let expected = [tree.limit("inner/memory.max", 1024, 5), tree.limit("memory.max", 4096, 10)];
    let seen = |membership: &str, root: &str| {
        Groups::of(&format!("0::{membership}\n"), &tree.mount(root, "cgroup2", "rw"))
    };
    let groups = seen("/docker/x/inner", "/docker/x");
    assert_eq!(groups.memory, expected);
    assert!(groups.has_hidden_ancestors);
    // The group is not under the mount: what there is counts.
    assert_eq!(seen("/elsewhere", "/docker/x").memory, expected[1..]);
    assert!(seen("/..", "/docker/x").has_hidden_ancestors);
}

#[test]
fn what_cannot_be_read_is_no_limit() {
    let tree = Tree::new();
    assert_eq!(Groups::of("", ""), Groups::default());
    assert_eq!(Groups::of("nonsense\n0::/a\n", "x - y\n").memory, []);
    assert_eq!(Groups::of("0::/a\n", &tree.mount("/", "cgroup2", "rw")).memory, []);
    tree.put("a", &[("memory.max", "lots"), ("memory.current", "1")]);
    assert_eq!(Groups::of("0::/a\n", &tree.mount("/", "cgroup2", "rw")).memory, []);
}

#[test]
fn blanks_in_a_path_are_octal() {
    assert_eq!(unescaped(r"/a\040b\134c"), Path::new(r"/a b\c"));
    assert_eq!(unescaped(r"/a\04"), Path::new(r"/a\04"));
}
