//! Manifests as objects of an API server, which has those and no others afterwards.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::apiserver::{Cluster, Kind};

/// Kind, namespace and name.
type Key = (Kind, String, String);

/// Objects that one owner has in an API server.
#[derive(Debug)]
pub struct Objects {
    cluster: Cluster,
    held: BTreeMap<Key, Value>,
}

impl Objects {
    /// None yet.
    pub fn new(cluster: Cluster) -> Self {
        Self { cluster, held: BTreeMap::new() }
    }

    /// Creates, replaces and deletes until these are the objects. Where the API server refuses
    /// one, the error says which and why, and what it took stays.
    pub async fn make(&mut self, manifests: &str) -> Result<()> {
        let wanted = read(manifests)?;
        // First what goes: an address or a node port must be free before another takes it.
        let gone: Vec<Key> = self
            .held
            .iter()
            .filter(|(key, before)| wanted.get(*key).is_none_or(|object| is_another(before, object)))
            .map(|(key, _)| key.clone())
            .collect();
        for key in gone {
            self.cluster.delete(key.0, &key.1, &key.2).await?;
            self.held.remove(&key);
        }
        for (key, object) in wanted {
            if self.held.get(&key) != Some(&object) {
                self.put(&key, &object).await.with_context(|| format!("{:?} {}/{}", key.0, key.1, key.2))?;
                self.held.insert(key, object);
            }
        }
        Ok(())
    }

    async fn put(&self, key: &Key, object: &Value) -> Result<()> {
        let (kind, namespace, name) = key;
        let before = self.held.get(key);
        match before {
            None => self.cluster.create(*kind, object.clone()).await?,
            Some(_) => self.cluster.replace(*kind, namespace, name, object).await?,
        };
        // The status is a thing of its own to the API server.
        let status = object.get("status");
        if status != before.and_then(|before| before.get("status")) {
            let status = status.cloned().unwrap_or_else(|| json!({"loadBalancer": null}));
            self.cluster.patch_status(*kind, namespace, name, json!({ "status": status })).await?;
        }
        Ok(())
    }
}

/// True where the API server would not let the one become the other, as a Service cannot change
/// its cluster IP.
fn is_another(before: &Value, after: &Value) -> bool {
    let address = |object: &Value| object["spec"]["clusterIP"].as_str().map(str::to_owned);
    match (address(before), address(after)) {
        (Some(before), Some(after)) => before != after,
        _ => before["addressType"] != after["addressType"],
    }
}

fn read(manifests: &str) -> Result<BTreeMap<Key, Value>> {
    let mut objects = BTreeMap::new();
    // As for the control plane: `name: off` is a name.
    let options = serde_saphyr::options! { strict_booleans: true };
    for object in serde_saphyr::read_with_options(&mut manifests.as_bytes(), options) {
        let mut object: Value = object.context("a manifest")?;
        let kind = match object["kind"].as_str() {
            Some("Service") => Kind::Service,
            Some("EndpointSlice") => Kind::EndpointSlice,
            Some("Node") => Kind::Node,
            other => bail!("{other:?}: a kind that is not known here"),
        };
        let metadata = object["metadata"].as_object_mut().context("a manifest without metadata")?;
        // The API server gives its own.
        metadata.remove("uid");
        let name = metadata.get("name").and_then(Value::as_str).context("a manifest without name")?;
        let namespace = metadata.get("namespace").and_then(Value::as_str).unwrap_or("default");
        let key = (kind, namespace.to_owned(), name.to_owned());
        objects.insert(key, object);
    }
    Ok(objects)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn manifests_are_known_by_kind_namespace_and_name() {
        let text = "kind: Service\nmetadata: {name: a, uid: x}\n---\nkind: Node\nmetadata: {name: b}\n";
        let objects = read(text).unwrap();
        let key = (Kind::Service, "default".to_owned(), "a".to_owned());
        assert_eq!(objects[&key], json!({"kind": "Service", "metadata": {"name": "a"}}));
        assert_eq!(objects.len(), 2);
        assert!(read("kind: Pod\nmetadata: {name: a}\n").is_err());
        assert!(read("").unwrap().is_empty());
    }

    #[test]
    fn a_service_with_another_cluster_ip_is_another_one() {
        let with = |address: &str| json!({"spec": {"clusterIP": address}});
        assert!(is_another(&with("10.96.0.1"), &with("10.96.0.2")));
        assert!(!is_another(&with("10.96.0.1"), &with("10.96.0.1")));
        assert!(!is_another(&with("10.96.0.1"), &json!({"spec": {"type": "ExternalName"}})));
    }
}
