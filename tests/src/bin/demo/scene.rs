//! What is on stage: nodes, pods, servers, the mesh, the wiretap.

use anyhow::{Context, Result};
use mesh_tests::catalog::NAMESPACE;
use mesh_tests::cluster::Cluster;
use mesh_tests::program::{Place, Program, Running, binary};
use mesh_tests::report::{Call, Capture};
use mesh_tests::world::{Pod, World};
use serde_json::json;
use std::fmt::Write;
use std::fs;
use std::net::SocketAddr;

/// Part of all that clients and servers say to each other, in both directions.
pub(crate) const MARKER: &str = "nodemesh-demo-secret";
/// Sent in plaintext by pods outside of the mesh: the wiretap must find it, or it proves nothing.
pub(crate) const CONTROL: &str = "nodemesh-demo-control";

/// The policy with a rule against `intruder`.
pub(crate) const DENYING: &str = "default/deny-intruder";
/// The policy that lets `curl` to `web`, and nobody else.
pub(crate) const ALLOWING_WEB: &str = "default/allow-web";

/// Everything is denied by default; these say what is not.
const POLICIES: &str = "\
apiVersion: nodemesh.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: allow-web, namespace: default}
spec:
  targetRefs: [{kind: Pod, selector: {matchLabels: {app: web}}}]
  rules:
    - name: curl
      sources: [{type: ServiceAccount, serviceAccount: {name: curl}}]
---
apiVersion: nodemesh.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: allow-backends, namespace: default}
spec:
  targetRefs: [{kind: Service, name: cache}, {kind: Service, name: echo}]
  rules:
    - name: redis-cli
      sources: [{type: ServiceAccount, serviceAccount: {name: redis-cli}}]
      networkAttributes: {ports: [6379]}
    - name: load
      sources: [{type: SPIFFE, spiffe: 'spiffe://mesh.test/ns/default/sa/load'}]
      networkAttributes: {ports: [7000]}
---
apiVersion: nodemesh.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: deny-intruder, namespace: default}
spec:
  action: DENY
  rules:
    - name: intruder
      sources: [{type: ServiceAccount, serviceAccount: {name: intruder}}]
";

const NGINX_PORT: u16 = 8080;
const REDIS_PORT: u16 = 6379;
const ECHO_PORT: u16 = 7000;
const PAGE_REPEATS: usize = 100;

pub(crate) struct Scene {
    // Servers and wiretap end before the world goes.
    tap: std::cell::RefCell<Option<Running>>,
    pub(crate) echo: Running,
    _nginx: Running,
    _redis: Running,
    _bystander: Running,
    pub(crate) cluster: Cluster,
}

impl Scene {
    pub(crate) fn set(transport: &str) -> Result<Self> {
        let topology = World::named("demo")
            .node("n1")
            .pods(&["curl", "redis-cli", "load", "intruder", "outsider"])
            .node("n2")
            .pods(&["web", "cache", "echo", "bystander"]);
        let cluster = Cluster::joined(topology, &json!({"ttl": "12h"}), |catalog| {
            catalog.mesh("transport", transport);
            catalog.default_action("deny");
            catalog.document("policies", POLICIES);
            catalog.service("web", 80, NGINX_PORT);
            catalog.service("cache", REDIS_PORT, REDIS_PORT);
            catalog.service("echo", ECHO_PORT, ECHO_PORT);
            for pod in ["outsider", "bystander"] {
                catalog.remove(pod);
            }
        })?;
        let world = &cluster.world;
        let mut nginx = nginx(world)?;
        nginx.wait_for_listener(NGINX_PORT)?;
        let folder = world.folder().to_string_lossy().into_owned();
        let mut redis = Program::new("redis-server")
            .args(["--port", &REDIS_PORT.to_string(), "--bind", "0.0.0.0", "::", "--protected-mode", "no"])
            .args(["--save", "", "--appendonly", "no", "--dir", &folder])
            .start_in(world.pod("cache"))?;
        redis.wait_for_listener(REDIS_PORT)?;
        let mut echo = echo_server(world.pod("echo"))?;
        echo.wait_for_listener(ECHO_PORT)?;
        let mut bystander = echo_server(world.pod("bystander"))?;
        bystander.wait_for_listener(ECHO_PORT)?;
        let link = Place { namespace: world.switch().path().into(), ..world.node("n1").into() };
        let mut tap =
            Program::probe(["sniff", "--device", "n1", "--marker", MARKER, "--marker", CONTROL]).start_in(link)?;
        tap.wait_for_text("watching")?;
        Ok(Self { tap: Some(tap).into(), echo, _nginx: nginx, _redis: redis, _bystander: bystander, cluster })
    }

    /// Two pods outside of the mesh talk across the same link, in plaintext.
    pub(crate) fn send_control(&self) -> Result<()> {
        let world = &self.cluster.world;
        let destination = SocketAddr::from((world.pod("bystander").v4(), ECHO_PORT)).to_string();
        let call: Call = Program::probe(["call", "blocking", &destination, "--message", CONTROL])
            .run_in(world.pod("outsider"))?
            .json()?;
        anyhow::ensure!(call.ok, "pods outside of the mesh do not reach each other: {:?}", call.error);
        Ok(())
    }

    /// What the wiretap has seen; it ends with this.
    pub(crate) fn capture(&self) -> Result<Capture> {
        let tap = self.tap.take().context("the wiretap was read before")?;
        tap.stop()?.success()?.json()
    }

    /// Nginx's own account of its clients' addresses.
    pub(crate) fn nginx_clients(&self) -> Result<Vec<String>> {
        let path = self.cluster.world.folder().join("nginx/access.log");
        let log = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(log.lines().map(str::to_owned).collect())
    }

    /// How to try things by hand.
    pub(crate) fn instructions(&self) -> String {
        let cluster = &self.cluster;
        let mut text = String::from("\nEverything stays up until Ctrl-C. In another terminal, as root:\n\n");
        let mut line = |comment: &str, command: String| {
            let _ = writeln!(text, "  # {comment}\n  {command}\n");
        };
        let pod = cluster.world.pod("curl");
        let enter = |pod: &Pod, command: &str| {
            let (group, namespace) = (pod.cgroup().display(), pod.namespace().path().display());
            format!("sh -c 'echo $$ > {group}/cgroup.procs && exec nsenter --net={namespace} {command}'")
        };
        let [web, _] = cluster.catalog.vips("web");
        let [_, cache] = cluster.catalog.vips("cache");
        line("a shell inside the pod `curl`", enter(pod, "bash"));
        line("a request from it, over IPv4", enter(pod, &format!("curl --silent --include http://{web}/")));
        let redis = format!("redis-cli -h {} -p {} ping", cache.ip(), cache.port());
        line("a command to redis, over IPv6", enter(cluster.world.pod("redis-cli"), &redis));
        for daemon in cluster.daemons() {
            let (cli, socket) = (binary("nodemesh"), daemon.socket().display());
            line(&format!("what {} does", daemon.node()), format!("{} --socket {socket} status", cli.display()));
        }
        line("the catalog: edit it and watch it take effect", format!("ls {}", cluster.catalog.folder().display()));
        text
    }

    /// The identity of a service account of the demo.
    pub(crate) fn identity(&self, account: &str) -> String {
        self.cluster.authority.spiffe_id(NAMESPACE, account)
    }
}

fn echo_server(pod: &Pod) -> Result<Running> {
    Program::probe(["echo", "--port", &ECHO_PORT.to_string()]).start_in(pod)
}

fn nginx(world: &World) -> Result<Running> {
    let folder = world.folder().join("nginx");
    fs::create_dir(&folder)?;
    let page = format!("{MARKER}\n").repeat(PAGE_REPEATS);
    fs::write(folder.join("index.html"), page)?;
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .iter()
        .map(|kind| format!("  {kind}_temp_path {}/{kind};\n", folder.display()))
        .collect();
    let folder_name = folder.display();
    let config = format!(
        "daemon off;\nmaster_process off;\npid {folder_name}/pid;\nerror_log stderr;\nevents {{}}\nhttp {{\n{temporary}\
         \x20 log_format client '$remote_addr';\n  access_log {folder_name}/access.log client;\n  server {{\n\
         \x20   listen {NGINX_PORT};\n    listen [::]:{NGINX_PORT};\n    root {folder_name};\n  }}\n}}\n"
    );
    let path = folder.join("nginx.conf");
    fs::write(&path, config)?;
    Program::new("nginx").args(["-e", "stderr", "-c"]).args([&path]).start_in(world.pod("web"))
}
