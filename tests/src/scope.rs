//! What a test process leaves on the machine while it runs: one directory and some child processes.
//!
//! A shell holds the list and reads it from a pipe. The pipe closes when the process ends, in
//! whatever way (a panic, `exit`, SIGKILL), and the shell then ends the children and removes the
//! directory. It is in a process group of its own, so that Ctrl-C does not end it first.

use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{LazyLock, Mutex};

use tempfile::TempDir;

/// Reads lines `+ PID SIGNAL`, `- PID` and `m DIRECTORY`, which has a file system mounted. The wait at the end is bounded: where nobody reaps an
/// orphan, it can be signalled for ever.
const CLEANER: &str = r#"
list=
mounts=
while read -r change pid signal; do
  case $change in
    m) mounts="$mounts $pid" ;;
    +) list="$list $signal:$pid" ;;
    -) kept=
       for entry in $list; do [ "${entry#*:}" = "$pid" ] || kept="$kept $entry"; done
       list=$kept ;;
  esac
done
for entry in $list; do kill -"${entry%%:*}" "${entry#*:}"; done
for entry in $list; do
  tries=0
  while kill -0 "${entry#*:}" && [ $tries -lt 50 ]; do sleep 0.1; tries=$((tries + 1)); done
done
for mount in $mounts; do umount -l "$mount"; done
rm -rf "$1"
"#;

/// A mounted file system; it goes when it is dropped, after whoever has files open in it.
pub struct SmallDisk {
    directory: TempDir,
}

impl SmallDisk {
    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.directory.path()).status();
    }
}

/// How a left-over child is ended.
#[derive(Clone, Copy, Debug)]
pub enum EndBy {
    /// SIGKILL.
    Kill,
    /// SIGTERM, for a process that ends its own children then.
    Term,
    /// SIGQUIT: PostgreSQL's immediate shutdown, which takes its own children along.
    Quit,
}

/// This test process's directory and its children.
pub struct Scope {
    root: PathBuf,
    cleaner: Mutex<Child>,
}

impl Scope {
    /// The one scope of this process, begun at its first use.
    pub fn current() -> &'static Scope {
        static SCOPE: LazyLock<Scope> = LazyLock::new(Scope::begin);
        &SCOPE
    }

    fn begin() -> Scope {
        let root = tempfile::Builder::new().prefix("cloister-tests-").tempdir().expect("temporary directory").keep();
        // A database server may run as another user and needs to reach what is its own in here.
        fs::set_permissions(&root, Permissions::from_mode(0o711)).expect("permissions of the temporary directory");
        let cleaner = Command::new("sh")
            .args(["-c", CLEANER, "cleaner"])
            .arg(&root)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .expect("sh starts");
        Scope { root, cleaner: Mutex::new(cleaner) }
    }

    /// A new directory, removed when the value is dropped, at the latest with the process.
    pub fn directory(&self) -> TempDir {
        TempDir::new_in(&self.root).expect("temporary directory")
    }

    /// A file system in memory that holds `mebibytes` and no more. None where this process may not mount.
    pub fn small_disk(&self, mebibytes: u32) -> Option<SmallDisk> {
        let directory = self.directory();
        let size = format!("size={mebibytes}m");
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(directory.path()).output();
        if !mount.is_ok_and(|output| output.status.success()) {
            return None;
        }
        self.tell(&format!("m {}\n", directory.path().display()));
        Some(SmallDisk { directory })
    }

    /// Has `pid` ended when this process ends.
    pub fn adopt(&self, pid: u32, end_by: EndBy) {
        let signal = match end_by {
            EndBy::Kill => "KILL",
            EndBy::Term => "TERM",
            EndBy::Quit => "QUIT",
        };
        self.tell(&format!("+ {pid} {signal}\n"));
    }

    /// Forgets `pid`, which has ended.
    pub fn disown(&self, pid: u32) {
        self.tell(&format!("- {pid}\n"));
    }

    /// A cleaner that is gone must not fail a test: it is told from destructors too.
    fn tell(&self, line: &str) {
        if let Ok(mut cleaner) = self.cleaner.lock()
            && let Some(pipe) = cleaner.stdin.as_mut()
        {
            let _ = pipe.write_all(line.as_bytes());
        }
    }
}
