#!/usr/bin/env bash
# Judges what is in deploy/, without starting any of it: the systemd unit, the Dockerfile, the Kubernetes manifests as
# kustomize puts them together, and the compose file where Docker is there to read it.
# Argument: the directory with hadolint and kubernetes-validate.
set -euo pipefail
cd "$(dirname "$0")/.."
programs=$1

# The unit's exposure as systemd counts it, in tenths: 0 is none, 100 is all. A line that protects and goes missing is noticed.
EXPOSURE_MAX=20

# The oldest and the newest Kubernetes that the manifests are for.
KUBERNETES_VERSIONS=(1.30 1.37)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The unit's program is not installed here: one that is takes its place.
sed 's#^ExecStart=/usr/local/bin/hallpass#ExecStart=/bin/true#' deploy/systemd/hallpass.service >"$work/hallpass.service"
complaints=$(systemd-analyze verify --man=no "$work/hallpass.service" 2>&1 || true)
if [ -n "$complaints" ]; then
    echo "$complaints" >&2
    exit 1
fi
systemd-analyze security --offline=yes --threshold=$EXPOSURE_MAX "$work/hallpass.service" >"$work/exposure" ||
    { cat "$work/exposure" >&2; exit 1; }

"$programs/hadolint" deploy/docker/Dockerfile

for overlay in base migrate overlays/staging overlays/production; do
    kubectl kustomize "deploy/kubernetes/$overlay" >"$work/manifest.yaml"
    for version in "${KUBERNETES_VERSIONS[@]}"; do
        "$programs/kubernetes-validate" --strict --quiet -k "$version" "$work/manifest.yaml"
    done
done

if docker compose version >/dev/null 2>&1; then
    POSTGRES_PASSWORD=x HALLPASS_MIGRATOR_PASSWORD=x HALLPASS_SERVICE_PASSWORD=x GRAFANA_PASSWORD=x \
        docker compose --file deploy/compose/compose.yaml config --quiet
fi
for file in deploy/compose/*.y*ml deploy/prometheus/*.yml deploy/grafana/provisioning/*/*.yml; do
    "$programs/python" -c 'import sys, yaml; yaml.safe_load(open(sys.argv[1]))' "$file"
done
