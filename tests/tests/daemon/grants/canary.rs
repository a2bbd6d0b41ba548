//! Where the secret is, by a search of the whole host as root: in the vault and in the sandbox's gateway, and nowhere else.

use std::io::{Read, Seek, SeekFrom};

use super::*;

/// Where the secret may not be found, as plain text and in base64.
fn forms(secret: &str) -> Vec<Vec<u8>> {
    let bearer = format!("Bearer {secret}");
    let base64 = |text: &str| {
        let mut child = Command::new("base64")
            .arg("-w0")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        std::io::Write::write_all(&mut child.stdin.take().expect("a pipe"), text.as_bytes())
            .expect("it reads");
        child.wait_with_output().expect("it ends").stdout
    };
    // The last characters depend on what follows.
    let stem = |text: Vec<u8>| text[..text.len() - 4].to_vec();
    vec![secret.as_bytes().to_vec(), stem(base64(secret)), stem(base64(&bearer))]
}

fn holds(bytes: &[u8], forms: &[Vec<u8>]) -> bool {
    forms.iter().any(|form| bytes.windows(form.len()).any(|window| window == form))
}

/// Everything that a process can read and write of its own, and what it was started with.
fn is_in_memory(pid: i32, forms: &[Vec<u8>]) -> bool {
    let place = |name: &str| format!("/proc/{pid}/{name}");
    if [place("environ"), place("cmdline")]
        .iter()
        .any(|path| fs::read(path).is_ok_and(|bytes| holds(&bytes, forms)))
    {
        return true;
    }
    let (Ok(maps), Ok(mut memory)) = (fs::read_to_string(place("maps")), fs::File::open(place("mem"))) else {
        return false;
    };
    for line in maps.lines().filter(|line| line.contains(" rw") && !line.contains("[vvar")) {
        let Some((begin, end)) = line.split(' ').next().and_then(|range| range.split_once('-')) else {
            continue;
        };
        let number = |text: &str| u64::from_str_radix(text, 16).expect("an address");
        let (begin, end) = (number(begin), number(end));
        let mut bytes = vec![0; usize::try_from(end - begin).expect("it fits").min(64 << 20)];
        if memory.seek(SeekFrom::Start(begin)).is_ok() {
            // Of what was never touched nothing can be read; the rest is there.
            let mut at = 0;
            while at < bytes.len() {
                match memory.read(&mut bytes[at..]) {
                    Ok(count @ 1..) => at += count,
                    _ => break,
                }
            }
            if holds(&bytes[..at], forms) {
                return true;
            }
        }
    }
    false
}

fn is_below(folder: &Path, forms: &[Vec<u8>]) -> Option<PathBuf> {
    let listed = fs::read_dir(folder).expect("root may");
    listed.flatten().map(|entry| entry.path()).find_map(|path| {
        if path.is_dir() {
            is_below(&path, forms)
        } else if path.is_file() && fs::read(&path).is_ok_and(|bytes| holds(&bytes, forms)) {
            Some(path)
        } else {
            None
        }
    })
}

fn all_below(pid: i32) -> Vec<i32> {
    let children = children(pid.cast_unsigned());
    children.iter().copied().chain(children.iter().flat_map(|child| all_below(*child))).collect()
}

fn role_of(pid: i32) -> String {
    let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.split('\0').skip_while(|word| *word != "role").nth(1).unwrap_or("other").to_owned()
}

/// CB-02 from outside. The control is the search itself: it finds the secret where it has to be.
#[test]
fn the_secret_is_in_the_vault_and_the_gateway_and_nowhere_else() {
    let secret = secret();
    let nginx = Nginx::start(&secret);
    let daemon = daemon(&api(&nginx, READ_ALL), &secret);
    let mut command = daemon.broker(ADA, &["exec", "--grant", "api"]);
    // A bad grant too, an error, a reply with everything in it: each is a place where it could show.
    let script = "curl -sSi https://api.test/a; curl -sSi https://api.test/away; curl -sSi -X PUT https://api.test/b; env; echo up; sleep 60";
    let mut child = command
        .args(["--", "sh", "-c", script])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut output = std::io::BufReader::new(child.stdout.take().expect("a pipe"));
    let mut said = String::new();
    while !said.ends_with("up\n") {
        assert_ne!(
            std::io::BufRead::read_line(&mut output, &mut said).expect("text"),
            0,
            "{said}\n{}",
            daemon.log()
        );
    }
    let forms = forms(&secret);
    assert!(said.contains("hello ada") && !holds(said.as_bytes(), &forms), "{said}");
    let launcher = daemon.role("launcher").expect("it lives");
    let family: Vec<i32> = std::iter::once(launcher).chain(all_below(launcher)).collect();
    assert!(
        family.len() >= 8,
        "launcher, core, vault, resolver, gateway, supervisor, init, workload: {family:?}"
    );
    let mut found: Vec<String> =
        family.iter().filter(|pid| is_in_memory(**pid, &forms)).map(|pid| role_of(*pid)).collect();
    found.sort();
    assert_eq!(found, ["gateway", "vault"]);
    assert!(!is_in_memory(i32::try_from(child.id()).expect("a pid"), &forms), "who asked for it");
    let state = daemon.state();
    assert_eq!(
        is_below(state.parent().expect("a directory"), &forms),
        None,
        "record, store, log, configuration"
    );
    child.kill().expect("it is ours");
    let _ = child.wait();
    // Afterwards: with the sandbox its gateway is gone, and nobody else has it now.
    let after = || -> Vec<String> {
        let family: Vec<i32> = std::iter::once(launcher).chain(all_below(launcher)).collect();
        family.iter().filter(|pid| is_in_memory(**pid, &forms)).map(|pid| role_of(*pid)).collect()
    };
    assert!(within(Duration::from_secs(5), || after() == ["vault"]), "{:?}", after());
}
