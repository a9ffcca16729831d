"""What of a namespace the chart's values name: Secrets, claims, a queue. By names, one list each.

- Of Secrets only the metadata is asked for: no content of one crosses the network.
- Names are those of the docs. Values may say others, so what lacks is told as not known to be
  wrong, with the value that names it.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from regreen.cli.doctor import Finding

if TYPE_CHECKING:
    from regreen.cli.doctor_kube import Api

SECRETS = {
    "regreen-blobs": "blobs.secret",
    "regreen-database": "postgres.urlSecret, unless CloudNativePG makes it",
    "regreen-tokens": "security.tokens.secret",
    "regreen-client-tokens": "security.tokens.clientSecret",
    **{
        f"regreen-{part}-tls": "security.tls.secretPrefix"
        for part in ("dataset", "sandbox", "policy", "judge", "learner", "rollout")
    },
}
"""Secrets of the release's namespace, and the values that name them."""
SECRETS_OF_WORKERS = {
    "regreen-blobs": "blobs.secret",
    "regreen-sandbox-worker-tls": "security.tls.secretPrefix",
}
_SHARED = ("ReadWriteMany",)
_READ = ("ReadWriteMany", "ReadOnlyMany")
_SHARING = ("nfs", "cephfs", "efs", "file", "lustre", "fsx", "juicefs", "longhorn", "gpfs", "weka")
"""Words of provisioners whose volumes many nodes may mount."""
_QUEUE = "regreen"
_KUEUE = "/apis/kueue.x-k8s.io"


async def secrets(api: "Api", space: str, wanted: Mapping[str, str], name: str) -> list[Finding]:
    """Whether Secrets are there."""
    listed = await api.items(f"/api/v1/namespaces/{space}/secrets", metadata_alone=True)
    lacking = _lacking(listed, wanted)
    if not lacking:
        return [Finding(name, True, f"all {len(wanted)} are in {space}")]
    values = sorted({wanted[one] for one in lacking})
    remedy = f"make them (security.md), or name yours: {'; '.join(values)}"
    return [Finding(name, None, f"not in {space}: {', '.join(lacking)}", remedy)]


def _lacking(listed: Sequence[Mapping[str, Any]], wanted: Collection[str]) -> list[str]:
    there = {item["metadata"]["name"] for item in listed}
    return [one for one in wanted if one not in there]


async def claims(api: "Api", space: str) -> list[Finding]:
    """Claims of the namespace: one for the base model, one that the learner writes to."""
    listed = await api.items(f"/api/v1/namespaces/{space}/persistentvolumeclaims")
    shared = _named(listed, _SHARED)
    models = [one for one in _named(listed, _READ) if one != "regreen-shared"]
    made = "storage.shared.existingClaim is empty: the chart makes one"
    needs = "make one of mode ReadOnlyMany or ReadWriteMany for storage.model.existingClaim"
    return [
        Finding("shared claim", True, ", ".join(shared) or "none", "" if shared else made),
        Finding(
            "model claim",
            True if models else None,
            ", ".join(models) or f"no claim in {space} that many nodes may mount",
            "" if models else needs,
        ),
    ]


def _named(listed: Sequence[Mapping[str, Any]], modes: Collection[str]) -> list[str]:
    """Names of the claims that are of one of these modes."""
    return sorted(
        item["metadata"]["name"]
        for item in listed
        if set(modes) & set((item.get("spec") or {}).get("accessModes") or ())
    )


async def storage(api: "Api") -> list[Finding]:
    """Classes whose volumes many nodes may mount; a class itself does not say, its name may."""
    listed = await api.items("/apis/storage.k8s.io/v1/storageclasses")
    sharing = sorted(
        item["metadata"]["name"]
        for item in listed
        if any(word in str(item.get("provisioner", "")).lower() for word in _SHARING)
    )
    remedy = "give storage.shared.storageClass one with ReadWriteMany, or a claim that is there"
    others = ", ".join(sorted(item["metadata"]["name"] for item in listed)) or "none"
    told = ", ".join(sharing) or f"none that is known for it (classes: {others})"
    return [Finding("shared storage", True if sharing else None, told, "" if sharing else remedy)]


async def queue(api: "Api", space: str) -> list[Finding]:
    """The LocalQueue that admits the learner of the overlay rl-large."""
    group = await api.ask(_KUEUE)
    version = ((group or {}).get("preferredVersion") or {}).get("groupVersion")
    if not version:
        return [Finding("queue", True, "no Kueue", "install it for the overlay rl-large")]
    listed = await api.items(f"/apis/{version}/namespaces/{space}/localqueues")
    if not _lacking(listed, [_QUEUE]):
        return [Finding("queue", True, f"LocalQueue {_QUEUE}")]
    remedy = "make it for the overlay rl-large, whose learner waits for it (its first line)"
    return [Finding("queue", True, f"no LocalQueue {_QUEUE} in {space}", remedy)]
