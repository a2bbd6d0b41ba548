//! Names, paths and commands made of what separates, escapes and expands elsewhere.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Output, Stdio};

use broker_tests::{Sandbox, canary};

use super::{bare, folder, text};

/// SU-03. Method: workspaces whose names are made of what separates, escapes and expands elsewhere. Oracle: a
/// marker that lies only in the directory of exactly that name; a decoy lies where a careless reading leads.
#[test]
fn su_03_workspace_names_mean_exactly_themselves() {
    let (place, policies) = (folder("su-03-"), folder("su-03-"));
    let policy = policies.path().join("policy.toml");
    std::fs::write(&policy, "extends = \"default\"\n").expect("the policy is written");
    let names: [&[u8]; 16] = [
        b"plain",
        b"trailing/",
        b"a b",
        b"a,b",
        b"a\\b",
        b"a\"b",
        b"a'b",
        b"a\nb",
        b"a=b",
        b"~",
        b"$HOME",
        b"-x",
        b"--policy=y",
        b"a\xff\xfeb",
        b"upperdir=x,lowerdir=y",
        b"%2e%2e",
    ];
    for name in names {
        let token = canary();
        let path = place.path().join(OsStr::from_bytes(name));
        std::fs::create_dir(&path).expect("a directory");
        std::fs::write(path.join("marker"), &token).expect("a file");
        for absolute in [true, false] {
            let value =
                if absolute { path.as_os_str().to_owned() } else { OsStr::from_bytes(name).to_owned() };
            let mut command = bare(&policy);
            command.arg("--workspace").arg(&value);
            let output = command
                .args(["--", "cat", "/workspace/marker"])
                .current_dir(place.path())
                .stdin(Stdio::null());
            let output = output.output().expect("broker runs");
            let exact = output.status.success() && text(&output.stdout) == token;
            // What cannot be taken has to be said; a relative name that looks like an option may well be
            // refused.
            let refused = matches!(output.status.code(), Some(125 | 2)) && !output.stderr.is_empty();
            let odd = value.as_bytes().starts_with(b"-") || std::str::from_utf8(name).is_err();
            assert!(exact || (refused && odd), "SU-03: workspace {value:?}: {output:?}");
        }
    }
    // The mode is split off at the end, once.
    for (name, value, writable) in
        [("m", "m:ro", false), ("m:ro", "m:ro:ro", false), ("m:rw", "m:rw:ro", false), ("n", "n:rw", true)]
    {
        let path = place.path().join(name);
        std::fs::create_dir(&path).expect("a directory");
        std::fs::write(path.join("marker"), name).expect("a file");
        let value = place.path().join(value).display().to_string();
        let output = Sandbox::new().option("--workspace").option(value).shell("cat marker; echo x > written");
        assert!(text(&output.stdout) == name, "SU-03: {name}: {output:?}");
        assert_eq!(path.join("written").exists(), writable, "SU-03: {name}: {output:?}");
    }
}

/// SU-03. Method: workspaces that name nothing, no directory, or what is too long. Oracle: exit status 125
/// and one line that says so.
#[test]
fn su_03_workspaces_that_name_nothing_are_refused() {
    let place = folder("su-03-");
    std::fs::write(place.path().join("file"), "").expect("a file");
    let long = format!("/{}", "a/".repeat(2048));
    let file = place.path().join("file").display().to_string();
    let missing = place.path().join("missing").display().to_string();
    for value in ["", ":ro", ":rw", &*long, &*file, &*missing, "~", "~/x", "~root"] {
        let output = Sandbox::new().option("--workspace").option(value).shell("echo ran");
        assert_eq!(output.status.code(), Some(125), "SU-03: workspace {value:.20}: {output:?}");
        assert!(
            output.stdout.is_empty() && !output.stderr.is_empty(),
            "SU-03: workspace {value:.20}: {output:?}"
        );
    }
}

/// SU-03 (CVE-2024-32462). Method: programs and arguments that look like our options. Oracle: they reach the
/// program as they are, or are looked for as a program; none of them widens the policy.
#[test]
fn su_03_commands_are_never_read_as_options() {
    let sandbox = Sandbox::new();
    for name in [
        "--policy=/dev/null",
        "--workspace=/",
        "--help",
        "-h",
        "--version",
        "-c",
        "--",
        "",
        ".",
        "..",
        "//",
        "/",
        "~",
    ] {
        let output = sandbox.command().arg(name).output().expect("broker runs");
        assert!(matches!(output.status.code(), Some(126 | 127)), "SU-03: command {name:?}: {output:?}");
        assert!(output.stdout.is_empty(), "SU-03: command {name:?} was understood: {output:?}");
    }
    let odd: Vec<&OsStr> = [&b"--workspace=/"[..], b"", b"a\nb", b"\xff\xfe", b"--", b"$(id)", b"-"]
        .map(OsStr::from_bytes)
        .into();
    let output = sandbox.command().args(["printf", "%s|"]).args(&odd).output().expect("broker runs");
    let mut expected = odd.join(OsStr::new("|")).into_encoded_bytes();
    expected.push(b'|');
    assert_eq!(output.stdout, expected, "SU-03: arguments change on their way: {output:?}");
    // One argument longer than the kernel takes is an error, and nothing else.
    let output = sandbox.command().arg("a".repeat(4097)).output().expect("broker runs");
    assert!(matches!(output.status.code(), Some(125..=127)), "SU-03: a long name: {:?}", output.status);
}

/// SU-03. Method: paths in a policy that climb, repeat or hide. Oracle: a canary that only a wider reading
/// shows.
#[test]
fn su_03_policy_paths_do_not_widen() {
    let (place, token) = (folder("su-03-"), canary());
    std::fs::create_dir_all(place.path().join("shown/below")).expect("directories");
    std::fs::write(place.path().join("secret"), &token).expect("a file");
    let shown = place.path().join("shown").display().to_string();
    let secret = place.path().join("secret").display().to_string();
    let attempts = [
        String::new(),
        ".".into(),
        "..".into(),
        "~root".into(),
        "shown".into(),
        "../../..".into(),
        "//".into(),
        "a\\u0000b".into(),
        format!("{shown}/../secret"),
        format!("{shown}/below/../../secret"),
        format!("{shown}\\u0000/x"),
        format!("/{}", "a/".repeat(2048)),
        "*".into(),
        format!("{shown}/../*"),
    ];
    let control = run_policy(place.path(), &format!("[files]\nread = [\"{secret}\"]\n"), &secret);
    assert_eq!(text(&control.stdout), token, "SU-03: a policy that names the file shows it: {control:?}");
    for path in attempts {
        let output = run_policy(place.path(), &format!("[files]\nread = [\"{path}\"]\n"), &secret);
        assert!(!text(&output.stdout).contains(&token), "SU-03: {path:.60} shows the secret");
    }
    // A newline in a name is that name.
    let odd = place.path().join("odd\nname");
    std::fs::write(&odd, &token).expect("a file");
    let path = odd.display().to_string();
    let output =
        run_policy(place.path(), &format!("[files]\nread = [\"{}\"]\n", path.replace('\n', "\\n")), &path);
    assert!(text(&output.stdout) == token || output.status.code() == Some(125), "SU-03: {output:?}");
}

fn run_policy(place: &Path, policy: &str, file: &str) -> Output {
    let path = place.join("policy.toml");
    std::fs::write(&path, format!("extends = \"default\"\n{policy}")).expect("the policy is written");
    bare(&path).args(["--", "cat", file]).current_dir(place).output().expect("broker runs")
}
