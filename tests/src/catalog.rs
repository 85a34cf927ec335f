//! The catalog that a world's daemons read: made from the topology, edited while everything runs.

use crate::policy::Policy;
use crate::service::Service;
use crate::traffic::Traffic;
use crate::world::{Pod, World};
use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

/// Kubernetes namespace of everything that says nothing else.
pub const NAMESPACE: &str = "default";

/// A directory of YAML documents, and the objects in it. Edits take effect with [`Self::write`].
#[derive(Debug)]
pub struct Catalog {
    folder: PathBuf,
    nodes: Vec<Value>,
    workloads: BTreeMap<String, Workload>,
    services: BTreeMap<String, Service>,
    policies: BTreeMap<String, Policy>,
    traffic: BTreeMap<String, Traffic>,
    /// Labels of namespaces.
    namespaces: BTreeMap<String, BTreeMap<String, String>>,
    /// Text by name, each a file of its own.
    documents: BTreeMap<String, String>,
    mesh: Map<String, Value>,
    next_vip: u16,
}

/// How the files of [`Catalog::document`] begin.
const DOCUMENT: &str = "document-";

/// A `WorkloadEntry`, made from a pod or for a process in its node's own network namespace.
#[derive(Clone, Debug)]
pub struct Workload {
    name: String,
    /// Distinguishes a pod made anew under the same name.
    uid: Option<String>,
    node: String,
    place: Place,
    pub addresses: Vec<IpAddr>,
    pub account: String,
    pub labels: BTreeMap<String, String>,
    pub weight: u32,
    pub ports: BTreeMap<String, u16>,
    pub port_modes: BTreeMap<u16, String>,
    /// Keeps its connections and gets no new ones.
    pub terminating: bool,
}

/// Where a workload runs.
#[derive(Clone, Debug)]
enum Place {
    Netns(PathBuf),
    Cgroup(PathBuf),
}

impl Catalog {
    /// Describes a world: every node, and every pod and host process as a workload whose label `app` and service account
    /// are its name. Those of host processes must be given ports.
    ///
    /// # Errors
    /// If the directory cannot be made.
    pub fn of(world: &World, folder: PathBuf, trust_domain: &str) -> Result<Self> {
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let nodes = world.nodes().map(|node| {
            let addresses = [IpAddr::from(node.v4()), IpAddr::from(node.v6())];
            json!({
                "apiVersion": "v1", "kind": "Node", "metadata": {"name": node.name()},
                "status": {"addresses": addresses.map(|address| json!({"type": "InternalIP", "address": address}))},
            })
        });
        let mut mesh = Map::new();
        mesh.insert("trustDomain".into(), trust_domain.into());
        let hosts = world.hosts().map(|host| {
            let place = Place::Cgroup(host.cgroup().to_owned());
            (host.name().to_owned(), Workload::at(host.name(), host.node(), place, &host.addresses()))
        });
        let workloads = world.pods().map(|pod| (pod.name().to_owned(), Workload::of(pod))).chain(hosts).collect();
        Ok(Self {
            folder,
            nodes: nodes.collect(),
            workloads,
            services: BTreeMap::new(),
            policies: BTreeMap::new(),
            traffic: BTreeMap::new(),
            namespaces: BTreeMap::new(),
            documents: BTreeMap::new(),
            mesh,
            next_vip: 1,
        })
    }

    /// Where the documents are.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Sets a field of MeshConfig's `spec`.
    pub fn mesh(&mut self, field: &str, value: impl Into<Value>) {
        self.mesh.insert(field.to_owned(), value.into());
    }

    /// What happens to connections that no policy decides, mesh-wide: `allow` or `deny`.
    pub fn default_action(&mut self, action: &str) {
        self.authorization("defaultAction", action);
    }

    /// What a denied connect() fails with: `EACCES` or `ECONNREFUSED`.
    pub fn denied_error(&mut self, error: &str) {
        self.authorization("deniedError", error);
    }

    fn authorization(&mut self, field: &str, value: &str) {
        self.mesh.entry("authorization").or_insert_with(|| json!({}))[field] = value.into();
    }

    /// Sets a label of a namespace: `nodemesh.io/mode` or `nodemesh.io/default-action`.
    pub fn namespace(&mut self, name: &str, label: &str, value: &str) {
        self.namespaces.entry(name.to_owned()).or_default().insert(label.to_owned(), value.to_owned());
    }

    /// Adds an ALLOW policy for every workload of [`NAMESPACE`], without rules; one that is there is replaced.
    pub fn policy(&mut self, name: &str) -> &mut Policy {
        self.policies.entry(name.to_owned()).insert_entry(Policy::named(name)).into_mut()
    }

    /// Takes a policy out of the catalog; returns whether it was there.
    pub fn remove_policy(&mut self, name: &str) -> bool {
        self.policies.remove(name).is_some()
    }

    /// Adds a traffic policy of [`NAMESPACE`] for the service of its name, without settings; one that is there is
    /// replaced.
    pub fn traffic(&mut self, service: &str) -> &mut Traffic {
        self.traffic.entry(service.to_owned()).insert_entry(Traffic::of(service)).into_mut()
    }

    /// Takes a traffic policy out of the catalog; returns whether it was there.
    pub fn remove_traffic(&mut self, service: &str) -> bool {
        self.traffic.remove(service).is_some()
    }

    /// How traffic within one node travels, mesh-wide: `Kernel` or `Tunnel`.
    pub fn same_node(&mut self, way: &str) {
        self.mesh("sameNode", way);
    }

    /// Sets the zone of a node.
    ///
    /// # Panics
    /// If there is no such node.
    pub fn zone(&mut self, node: &str, zone: &str) {
        let found = self.nodes.iter_mut().find(|known| known["metadata"]["name"] == node);
        let found = found.unwrap_or_else(|| panic!("there is no node {node:?}"));
        found["metadata"]["labels"] = json!({"topology.kubernetes.io/zone": zone});
    }

    /// Adds or replaces text that is a file of its own, sound or not.
    pub fn document(&mut self, name: &str, yaml: &str) {
        self.documents.insert(name.to_owned(), yaml.to_owned());
    }

    /// Takes such text out of the catalog; returns whether it was there.
    pub fn remove_document(&mut self, name: &str) -> bool {
        self.documents.remove(name).is_some()
    }

    /// Adds a service for the workloads whose label `app` is its name, with the next free virtual addresses.
    pub fn service(&mut self, name: &str, port: u16, target: impl Into<Value>) -> &mut Service {
        let number = self.next_vip;
        self.next_vip += 1;
        let [high, low] = number.to_be_bytes();
        let vips = vec![
            Ipv4Addr::new(10, 96, high, low).into(),
            IpAddr::from(Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, number)),
        ];
        let selector = BTreeMap::from([("app".to_owned(), name.to_owned())]);
        let service = Service::new(name, vips, selector, (port, target.into()));
        self.services.entry(name.to_owned()).insert_entry(service).into_mut()
    }

    /// [`Self::service`] with a UDP port and no TCP port.
    pub fn udp_service(&mut self, name: &str, port: u16, target: impl Into<Value>) -> &mut Service {
        let service = self.service(name, port, target);
        service.udp_ports = std::mem::take(&mut service.ports);
        service
    }

    /// A service's virtual addresses on its first port (TCP, if it has one): IPv4, IPv6.
    ///
    /// # Panics
    /// If there is no such service.
    #[must_use]
    pub fn vips(&self, service: &str) -> [SocketAddr; 2] {
        let service = self.services.get(service).unwrap_or_else(|| panic!("there is no service {service:?}"));
        let port = service.ports.iter().chain(&service.udp_ports).next().expect("a service has a port").0;
        [0, 1].map(|index| SocketAddr::new(service.vips[index], port))
    }

    /// A service, to change it.
    ///
    /// # Panics
    /// If there is no such service.
    pub fn service_mut(&mut self, name: &str) -> &mut Service {
        self.services.get_mut(name).unwrap_or_else(|| panic!("there is no service {name:?}"))
    }

    /// A workload, to change it.
    ///
    /// # Panics
    /// If there is no such workload.
    pub fn workload(&mut self, name: &str) -> &mut Workload {
        self.workloads.get_mut(name).unwrap_or_else(|| panic!("there is no workload {name:?}"))
    }

    /// All workloads, by name.
    pub fn workloads(&self) -> impl Iterator<Item = &Workload> {
        self.workloads.values()
    }

    /// Adds a pod that the world got later; a uid of its own tells it from an earlier pod of the name.
    pub fn add(&mut self, pod: &Pod, uid: Option<&str>) -> &mut Workload {
        let workload = Workload { uid: uid.map(str::to_owned), ..Workload::of(pod) };
        self.workloads.entry(pod.name().to_owned()).insert_entry(workload).into_mut()
    }

    /// Adds a workload that runs in its node's own network namespace, in this cgroup, and listens on these ports; its
    /// label `app` and service account are its name.
    pub fn host_workload(
        &mut self,
        name: &str,
        node: &str,
        cgroup: &Path,
        addresses: &[IpAddr],
        ports: &[(&str, u16)],
    ) -> &mut Workload {
        let workload = Workload {
            ports: ports.iter().map(|(name, port)| ((*name).to_owned(), *port)).collect(),
            ..Workload::at(name, node, Place::Cgroup(cgroup.to_owned()), addresses)
        };
        self.workloads.entry(name.to_owned()).insert_entry(workload).into_mut()
    }

    /// Takes a workload out of the catalog; returns whether it was there.
    pub fn remove(&mut self, workload: &str) -> bool {
        self.workloads.remove(workload).is_some()
    }

    /// Takes a service out of the catalog; returns whether it was there.
    pub fn remove_service(&mut self, name: &str) -> bool {
        self.services.remove(name).is_some()
    }

    /// Writes what has changed, each file in one step.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn write(&self) -> Result<()> {
        // Policies before the workloads that they protect: each file may be read by itself.
        let files = [
            "mesh.yaml",
            "nodes.yaml",
            "namespaces.yaml",
            "policies.yaml",
            "traffic.yaml",
            "services.yaml",
            "workloads.yaml",
        ];
        self.write_documents()?;
        files.iter().try_for_each(|name| self.write_only(name))
    }

    fn write_documents(&self) -> Result<()> {
        for entry in fs::read_dir(&self.folder)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let document = name.strip_prefix(DOCUMENT).and_then(|name| name.strip_suffix(".yaml"));
            if document.is_some_and(|document| !self.documents.contains_key(document)) {
                self.remove_file(&name)?;
            }
        }
        self.documents.iter().try_for_each(|(name, yaml)| self.write_file(&format!("{DOCUMENT}{name}.yaml"), yaml))
    }

    /// [`Self::write`] of one file, whatever has changed in the others.
    ///
    /// # Errors
    /// If there is no such file, or it cannot be written.
    pub fn write_only(&self, name: &str) -> Result<()> {
        let documents = match name {
            "mesh.yaml" => vec![json!({
                "apiVersion": "nodemesh.io/v1alpha1", "kind": "MeshConfig", "metadata": {"name": "mesh"},
                "spec": self.mesh,
            })],
            "nodes.yaml" => self.nodes.clone(),
            "services.yaml" => self.services.values().map(Service::document).collect(),
            "policies.yaml" => self.policies.values().map(Policy::document).collect(),
            "traffic.yaml" => self.traffic.values().map(Traffic::document).collect(),
            "namespaces.yaml" => {
                let namespaces = self.namespaces.iter();
                let document = |(name, labels)| json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}});
                namespaces.map(document).collect()
            }
            "workloads.yaml" => self.workloads.values().map(Workload::document).collect(),
            _ => bail!("the catalog has no file {name}"),
        };
        let texts = documents.iter().map(serde_saphyr::to_string).collect::<Result<Vec<_>, _>>()?;
        let path = self.folder.join(name);
        if texts.is_empty() && !path.exists() {
            return Ok(());
        }
        // An empty file is taken for one that is about to be written, and removes nothing.
        let text = if texts.is_empty() { "# none\n".to_owned() } else { texts.join("---\n") };
        write_atomically(&path, &text)
    }

    /// Writes any text as a file of the catalog, in one step.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write_file(&self, name: &str, text: &str) -> Result<()> {
        write_atomically(&self.folder.join(name), text)
    }

    /// Removes a file of the catalog.
    ///
    /// # Errors
    /// If it is not there.
    pub fn remove_file(&self, name: &str) -> Result<()> {
        let path = self.folder.join(name);
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))
    }
}

impl Workload {
    fn of(pod: &Pod) -> Self {
        let place = Place::Netns(pod.namespace().path().to_owned());
        Self::at(pod.name(), pod.node(), place, &pod.addresses())
    }

    fn at(name: &str, node: &str, place: Place, addresses: &[IpAddr]) -> Self {
        Self {
            name: name.to_owned(),
            uid: None,
            node: node.to_owned(),
            place,
            addresses: addresses.to_vec(),
            account: name.to_owned(),
            labels: BTreeMap::from([("app".to_owned(), name.to_owned())]),
            weight: 100,
            ports: BTreeMap::new(),
            port_modes: BTreeMap::new(),
            terminating: false,
        }
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Name of its node.
    #[must_use]
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Sets a label.
    pub fn label(&mut self, key: &str, value: &str) -> &mut Self {
        self.labels.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Makes it an endpoint of the service of that name, with that service's identity.
    pub fn of_app(&mut self, app: &str) -> &mut Self {
        app.clone_into(&mut self.account);
        self.label("app", app)
    }

    /// Sets `nodemesh.io/mode`: `strict`, `permissive` or `disabled`.
    pub fn mode(&mut self, mode: &str) -> &mut Self {
        self.label("nodemesh.io/mode", mode)
    }

    /// Sets `nodemesh.io/default-action`: `allow` or `deny`.
    pub fn default_action(&mut self, action: &str) -> &mut Self {
        self.label("nodemesh.io/default-action", action)
    }

    /// Takes it out of the rotation: it keeps its connections and gets no new ones.
    pub fn terminate(&mut self) -> &mut Self {
        self.terminating = true;
        self
    }

    fn document(&self) -> Value {
        let mut spec = json!({"node": self.node, "addresses": self.addresses, "serviceAccount": self.account});
        match &self.place {
            Place::Netns(path) => spec["netns"] = json!(path),
            Place::Cgroup(path) => spec["cgroup"] = json!(path),
        }
        if self.weight != 100 {
            spec["weight"] = self.weight.into();
        }
        if self.terminating {
            spec["terminating"] = true.into();
        }
        if !self.ports.is_empty() {
            spec["ports"] = json!(self.ports);
        }
        if !self.port_modes.is_empty() {
            spec["portModes"] = json!(self.port_modes);
        }
        let mut metadata = json!({"name": self.name, "namespace": NAMESPACE, "labels": self.labels});
        if let Some(uid) = &self.uid {
            metadata["uid"] = json!(uid);
        }
        json!({"apiVersion": "nodemesh.io/v1alpha1", "kind": "WorkloadEntry", "metadata": metadata, "spec": spec})
    }
}

/// Replaces a file in one step, unless it says the same already. The temporary name is none that the catalog reads.
fn write_atomically(path: &Path, text: &str) -> Result<()> {
    if fs::read_to_string(path).is_ok_and(|present| present == text) {
        return Ok(());
    }
    let folder = path.parent().context("a file is in a directory")?;
    let mut file = tempfile::Builder::new().prefix(".new-").tempfile_in(folder)?;
    file.write_all(text.as_bytes())?;
    file.persist(path).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(())
}
