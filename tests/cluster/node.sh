#!/usr/bin/env bash
# The first process of a cluster's namespaces (network, mounts, processes), started by up.sh: it lays folders of the
# cluster's own over the machine's, starts the parts in order, tells in $state/ready or $state/failed how that went, and
# then reaps what becomes an orphan. When it ends, however it ends, the kernel ends everything in here.
#
# From here on the cluster's folder is /mnt, its programs are in /mnt/bin.
#
# shellcheck disable=SC2154 # The settings are read from a file.
set -uo pipefail
state=$1 bin=$2

# Its number as the machine counts, read before the processes outside are out of sight.
read -ra self </proc/self/stat
echo "${self[0]} ${self[21]}" >"$state/first-process.new" && mv "$state/first-process.new" "$state/first-process"

# node=, host=, api=, pods=, simulated=
# shellcheck source=/dev/null
source "$state/settings"

# Seconds that a part has to become ready, also on a busy machine.
patience=120
# The parts' names by their process numbers.
declare -a names

fail() {
    echo "$*" >"$state/failed"
    exit 1
}

start() { # start NAME COMMAND...
    local name=$1
    shift
    "$@" >"/mnt/log/$name.log" 2>&1 </dev/null &
    names[$!]=$name
}

# Waits until a command succeeds; the parts that were started must live.
until_ready() { # until_ready WHAT COMMAND...
    local what=$1 end=$((SECONDS + patience)) part
    shift
    until "$@" >/mnt/log/waiting.log 2>&1; do
        for part in "${!names[@]}"; do
            kill -0 "$part" 2>/dev/null || fail "${names[part]} ended: $(tail -n 3 "/mnt/log/${names[part]}.log")"
        done
        ((SECONDS < end)) || fail "$what is not ready after $patience s: $(tail -n 3 /mnt/log/waiting.log)"
        sleep 0.1
    done
}

own_folders() {
    mount -t proc proc /proc &&
        mkdir -p "$state/bin" && mount --bind "$bin" "$state/bin" && mount --rbind "$state" /mnt || return
    # Whatever else comes, words of failure have their place in here.
    state=/mnt
    mkdir -p /mnt/var/{lib/{kubelet,cni,containerd},log/{pods,containers},tmp} &&
        mount --rbind /mnt/var /var && mount -t tmpfs tmpfs /run && mkdir -p /run/containerd /run/lock || return
    # What pods mount is seen by the kubelet and by containerd.
    mount --make-rshared / || return
    # The kubelet sets these for the whole machine if they differ. It reads what it wants to read, and leaves them.
    local setting file
    mkdir -p /mnt/sysctl
    for setting in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
        kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
        file=/mnt/sysctl/${setting//\//.}
        echo "${setting#*=}" >"$file"
        mount --bind "$file" "/proc/sys/${setting%=*}" || return
    done
}

own_network() {
    ip link set lo up
    # Its end of the link to the machine is put here from outside.
    until ip link set eth0 up 2>/dev/null; do sleep 0.05; done
    ip address add "$node/24" dev eth0
    [ "$simulated" = no ] || return 0
    echo 1 >/proc/sys/net/ipv4/ip_forward
    # What pods on one bridge say to each other passes the firewall only then.
    [ ! -e /proc/sys/net/bridge/bridge-nf-call-iptables ] || echo 1 >/proc/sys/net/bridge/bridge-nf-call-iptables
    # The world: another machine, which has every address that a test may want to reach, or may not.
    local there=(ip -netns world) addresses
    ip netns add world &&
        ip link add world type veth peer name eth0 netns world &&
        ip address add 198.18.0.1/30 dev world && ip link set world up &&
        "${there[@]}" link set lo up && "${there[@]}" link set eth0 up &&
        "${there[@]}" address add 198.18.0.2/30 dev eth0 && "${there[@]}" route add default via 198.18.0.1 || return
    for addresses in 203.0.113.0/24 198.51.100.0/24 169.254.169.254 10.99.0.0/24 172.16.99.0/24 192.168.99.0/24 \
        100.64.99.0/24; do
        "${there[@]}" route add local "$addresses" dev lo && ip route add "$addresses" via 198.18.0.2 || return
    done
    start world ip netns exec world probe world /mnt/pki/world.crt /mnt/pki/world.key "$node:6443"
}

start_control_plane() {
    local limits=()
    start etcd etcd --data-dir=/mnt/var/lib/etcd --unsafe-no-fsync --log-level=warn \
        --listen-client-urls=http://127.0.0.1:2379 --advertise-client-urls=http://127.0.0.1:2379 \
        --listen-peer-urls=http://127.0.0.1:2380 --initial-advertise-peer-urls=http://127.0.0.1:2380 \
        --initial-cluster=default=http://127.0.0.1:2380 --quota-backend-bytes=4294967296
    if [ "$simulated" = yes ]; then
        limits=(--max-requests-inflight=4000 --max-mutating-requests-inflight=2000)
    fi
    start kube-apiserver kube-apiserver --etcd-servers=http://127.0.0.1:2379 \
        --bind-address=0.0.0.0 --secure-port=6443 --advertise-address="$api" \
        --service-cluster-ip-range=10.96.0.0/16 --allow-privileged=true --authorization-mode=Node,RBAC \
        --client-ca-file=/mnt/pki/ca.crt --tls-cert-file=/mnt/pki/api.crt --tls-private-key-file=/mnt/pki/api.key \
        --service-account-issuer=https://kubernetes.default.svc --service-account-key-file=/mnt/pki/accounts.pub \
        --service-account-signing-key-file=/mnt/pki/accounts.key \
        --kubelet-client-certificate=/mnt/pki/admin.crt --kubelet-client-key=/mnt/pki/admin.key \
        --kubelet-certificate-authority=/mnt/pki/ca.crt --kubelet-preferred-address-types=InternalIP \
        --enable-admission-plugins=NodeRestriction \
        --audit-policy-file=/mnt/config/audit.yaml --audit-log-path=/mnt/audit.log --audit-log-maxsize=0 \
        "${limits[@]}"
}

start_controllers() {
    # The clients' usual rate limits would be all that a benchmark measures.
    start kube-controller-manager kube-controller-manager --kubeconfig=/mnt/kubeconfigs/kube-controller-manager \
        --leader-elect=false --secure-port=0 --use-service-account-credentials=true \
        --root-ca-file=/mnt/pki/ca.crt --service-account-private-key-file=/mnt/pki/accounts.key \
        --kube-api-qps=1000 --kube-api-burst=1000 --concurrent-deployment-syncs=50 --concurrent-replicaset-syncs=50 \
        --concurrent-namespace-syncs=50 --concurrent-resource-quota-syncs=50 --concurrent-gc-syncs=50 \
        --concurrent-serviceaccount-token-syncs=50 --concurrent-endpoint-syncs=50 --concurrent-service-endpoint-syncs=50
    start kube-scheduler kube-scheduler --kubeconfig=/mnt/kubeconfigs/kube-scheduler --leader-elect=false \
        --secure-port=0 --kube-api-qps=1000 --kube-api-burst=1000
}

start_containers() {
    local image
    start containerd containerd --config /mnt/config/containerd.toml --log-level warn
    until_ready containerd ctr version
    for image in pause coredns probe; do
        ctr --namespace k8s.io images import - <"/mnt/images/$image.tar" >/mnt/log/import.log 2>&1 ||
            fail "no image $image: $(tail -n 3 /mnt/log/import.log)"
    done
}

start_node() {
    start kubelet kubelet --config=/mnt/config/kubelet.yaml --kubeconfig=/mnt/kubeconfigs/node \
        --hostname-override=node --node-ip="$node"
    start kube-proxy kube-proxy --config=/mnt/config/kube-proxy.yaml --hostname-override=node
    kubectl apply -f /mnt/config/coredns.yaml >/mnt/log/apply.log 2>&1 ||
        fail "CoreDNS is not accepted: $(tail -n 3 /mnt/log/apply.log)"
    until_ready "the node" kubectl wait --for=condition=Ready node/node --timeout=5s
    # It doesn't start before the node is known. Of what it can, it enforces policies only.
    start kube-router kube-router --kubeconfig=/mnt/kubeconfigs/kube-router --hostname-override=node \
        --run-firewall=true --run-router=false --run-service-proxy=false --run-loadbalancer=false \
        --service-cluster-ip-range=10.96.0.0/16
    until_ready CoreDNS kubectl --namespace kube-system wait --for=condition=Available deployment/coredns --timeout=5s
}

start_simulation() {
    local number
    start kwok kwok --kubeconfig=/mnt/kubeconfigs/kwok --config=/mnt/config/kwok.yaml
    for number in {0..9}; do
        sed "s/@NUMBER@/$number/" /mnt/config/simulated-node.yaml
        echo ---
    done | kubectl apply -f - >/mnt/log/apply.log 2>&1 ||
        fail "the simulated nodes are not accepted: $(tail -n 3 /mnt/log/apply.log)"
    until_ready "the simulated nodes" kubectl wait --for=condition=Ready node --all --timeout=5s
}

own_folders || fail "it can't have folders of its own"
export PATH=/mnt/bin:$PATH KUBECONFIG=/mnt/kubeconfig TMPDIR=/var/tmp
cd / || exit
own_network || fail "it can't have a network of its own"
start_control_plane
[ "$simulated" = yes ] || start_containers
until_ready "the API server" kubectl get --raw /readyz
start_controllers
if [ "$simulated" = yes ]; then start_simulation; else start_node; fi
until_ready "the namespace default" kubectl get serviceaccount default
touch /mnt/ready

# Tells of parts that end; the others go on.
while wait -n -p ended; status=$?; [ "$status" -ne 127 ]; do
    echo "${names[ended]} ended with $status" >>/mnt/log/ended.log
done
