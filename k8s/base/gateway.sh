# What the gateway's pod runs: a Ray node, and beside it `expertmesh serve`, which puts the controller and the gateway on the
# node that it is started on. So this pod is the one that probes, Service and PodDisruptionBudget are about.
set -euo pipefail
# until serve takes over: a shell that is process 1 ignores SIGTERM unless it is told not to
trap 'exit 143' TERM
ulimit -n 65536 || true   # as in the other pods: where the runtime's limit is lower, with that

# no key may come twice, so neither source can overrule the other
cat /etc/expertmesh/server.yaml /etc/expertmesh-access/access.yaml > /tmp/server.yaml

# KubeRay's own command; it blocks for as long as the node lives
eval "$KUBERAY_GEN_RAY_START_CMD" &
until [ -S /tmp/ray/session_latest/sockets/raylet ]; do
  kill -0 $!   # ends this, too, if Ray could not start
  sleep 1
done

# in the place of the shell: SIGTERM reaches it alone, and it stops everything in order while Ray's node still runs
exec expertmesh serve --config /tmp/server.yaml
