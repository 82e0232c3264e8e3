# Starts and removes clusters. Sourced by scripts/cluster.
#
# A cluster is a folder ($cache/clusters/NAME), a first process (node.sh) in namespaces of its own, one end of a veth,
# and a cgroup. When the first process ends, the kernel ends every other and removes the network; the rest is rmdir.
# shellcheck shell=bash disable=SC2154

# A cluster outlives the terminal that it was started from.
apart=(setsid)

# Sets what is known of a cluster by its name, running or not.
name_cluster() { # name_cluster NAME
    [[ $1 =~ ^[a-z0-9][a-z0-9-]{0,62}$ ]] || fail "a cluster's name has small letters, digits and dashes, unlike '$1'"
    name=$1 state=$cache/clusters/$1
}

need_machine() {
    [ "$(uname -s)" = Linux ] || fail "clusters run on Linux only; point CLOISTER_TEST_KUBECONFIG at one of yours"
    [ "$(id -u)" -eq 0 ] || fail "a cluster needs root, for its namespaces and mounts: try again with sudo"
    need unshare "the package util-linux"
    need ip "the package iproute2"
    need openssl "the package openssl"
    [ "$1" = no ] || return 0
    need runc "the package runc"
    need nft "the package nftables"
    need iptables "the package iptables"
    need ipset "the package ipset"
    need conntrack "the package conntrack"
    [ -x /usr/lib/cni/bridge ] || fail "CNI's plugins are missing: install the package containernetworking-plugins"
}

# When a process started, in the kernel's ticks: with its number it names the process for ever.
started_at() { # started_at PID
    cut -d ' ' -f 22 "/proc/$1/stat" 2>/dev/null
}

is_running() {
    local pid ticks
    read -r pid ticks 2>/dev/null <"$state/first-process" && [ "$(started_at "$pid")" = "$ticks" ]
}

first_process() {
    local pid
    read -r pid _ <"$state/first-process"
    echo "$pid"
}

# One at a time starts or removes a cluster. The lock goes with the cluster, so whoever waited for it looks again.
lock_cluster() {
    mkdir -p "$cache/clusters"
    until [ "$state.lock" -ef /dev/fd/8 ]; do
        exec 8>"$state.lock"
        flock 8
    done
}

up() { # up [--simulated] [NAME]
    bring_up "$@"
    echo "export KUBECONFIG=$state/kubeconfig"
}

run() { # run [--simulated] NAME
    # Should even this process be killed, the cluster ends with it.
    apart=(setsid setpriv --pdeathsig KILL --)
    # Whoever asked may be gone before the answer.
    trap : PIPE
    bring_up "$@"
    trap 'down "$name"' EXIT
    trap 'exit 130' INT TERM
    echo "export KUBECONFIG=$state/kubeconfig" 2>/dev/null || true
    cat >/dev/null
}

bring_up() { # bring_up [--simulated] [NAME]
    local simulated=no
    if [ "${1:-}" = --simulated ]; then
        simulated=yes
        shift
    fi
    need_machine "$simulated"
    name_cluster "${1:-dev}"
    build
    sweep
    lock_cluster
    if ! is_running; then
        remove
        trap 'keep_logs; remove; rm -f "$state.lock"' EXIT
        trap 'exit 130' INT TERM
        begin "$simulated"
        trap - EXIT INT TERM
    fi
    exec 8>&-
}

# Removes what is left of clusters that ended with nobody to clean up, such as when every process was killed.
sweep() {
    local folder
    for folder in "$cache"/clusters/*/; do
        [ ! -d "$folder" ] || (
            name_cluster "$(basename "$folder")"
            exec 8>"$state.lock"
            # Whoever holds the lock is at it, or was until now.
            flock --nonblock 8 && [ "$state.lock" -ef /dev/fd/8 ] || exit 0
            is_running || { remove && rm -f "$state.lock"; }
        )
    done
}

down() { # down [NAME|--all]
    [ "$(id -u)" -eq 0 ] || fail "removing a cluster needs root: try again with sudo"
    local folder
    if [ "${1:-}" = --all ]; then
        for folder in "$cache"/clusters/*/; do
            [ ! -d "$folder" ] || (down "$(basename "$folder")")
        done
        return
    fi
    name_cluster "${1:-dev}"
    lock_cluster
    remove
    rm -f "$state.lock"
    exec 8>&-
}

enter() { # enter [NAME] COMMAND...
    name_cluster "$1"
    shift
    is_running || fail "there is no cluster $name"
    exec nsenter --target "$(first_process)" --net --mount --pid -- env \
        PATH="/mnt/bin:$PATH" KUBECONFIG=/mnt/kubeconfig "$@"
}

# Runs the probe in a pod's network, with the pod's resolver, whatever the pod's image holds.
probe() { # probe NAME NAMESPACE POD ARGUMENT...
    local name=$1 namespace=$2 pod=$3 filter sandbox process
    shift 3
    filter="labels.\"io.kubernetes.pod.namespace\"==$namespace,labels.\"io.kubernetes.pod.name\"==$pod"
    filter+=',labels."io.cri-containerd.kind"==sandbox'
    sandbox=$(containers "$name" containers list --quiet "$filter")
    [ -n "$sandbox" ] || fail "there is no pod $namespace/$pod"
    process=$(containers "$name" tasks list | awk -v sandbox="$sandbox" '$1 == sandbox { print $2 }')
    # shellcheck disable=SC2016 # The node's shell fills these in.
    enter "$name" nsenter --target "$process" --net unshare --mount bash -c '
        cat "/proc/$0/root/etc/resolv.conf" >"/run/resolv-$0.conf" &&
            mount --bind "/run/resolv-$0.conf" /etc/resolv.conf && exec probe "$@"' "$process" "$@"
}

containers() { # containers NAME ARGUMENT OF ctr...
    local name=$1
    shift
    (enter "$name" env CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS=1 ctr --namespace k8s.io "$@")
}

load() { # load NAME ARCHIVE...
    local archive name=$1
    shift
    for archive in "$@"; do
        containers "$name" images import - >/dev/null <"$archive" || fail "$archive is not loaded"
    done
}

# Makes the folder, starts the first process, gives it its network, and waits for its word.
begin() {
    local number simulated=$1 patience=300
    mkdir -p "$state"/{config,images,kubeconfigs,log,pki}
    claim_number
    node=10.250.$number.2 host=10.250.$number.1 pods=10.244.$number.0/24 cgroup=cloister-$number
    # Pods see the API server at an address that looks public, as many clouds have it: a policy that leaves the
    # internet open must know of it. What is simulated has no pods that look.
    api=198.51.100.6
    [ "$simulated" = no ] || api=$node
    printf '%s=%s\n' node "$node" host "$host" api "$api" pods "$pods" simulated "$simulated" >"$state/settings"
    fill_in_configuration
    make_certificates
    make_cgroups
    local image
    for image in pause probe coredns; do
        ln "$cache/images/$image""_test.tar" "$state/images/$image.tar" 2>/dev/null ||
            cp "$cache/images/$image""_test.tar" "$state/images/$image.tar"
    done
    "${apart[@]}" unshare --net --mount --propagation private --pid --fork --kill-child \
        bash "$parts/node.sh" "$state" "$cache/bin" </dev/null >"$state/log/node.log" 2>&1 8>&- &
    local launched=$! end=$((SECONDS + patience))
    until [ -s "$state/first-process" ]; do
        kill -0 "$launched" 2>/dev/null || fail "no namespaces: $(tail -n 3 "$state/log/node.log")"
        sleep 0.05
    done
    ip link set "$cgroup-peer" netns "$(first_process)" name eth0
    ip address add "$host/24" dev "$cgroup"
    ip link set "$cgroup" up
    ip route add "$pods" via "$node"
    until [ -e "$state/ready" ]; do
        [ ! -e "$state/failed" ] || fail "$(cat "$state/failed")"
        is_running || fail "it ended at once: $(tail -n 3 "$state/log/node.log")"
        ((SECONDS < end)) || fail "it is not ready after $patience s"
        sleep 0.1
    done
}

# Takes the first number that no other cluster on this machine has: the kernel gives a link's name only once.
claim_number() {
    for number in {0..99}; do
        if ip link add "cloister-$number" type veth peer name "cloister-$number-peer" 2>/dev/null; then
            echo "$number" >"$state/number"
            return
        fi
    done
    fail "100 clusters are enough: remove some with \`scripts/cluster down --all\`"
}

fill_in_configuration() {
    local file
    (cd "$parts/config" && find . -type f) | while read -r file; do
        mkdir -p "$(dirname "$state/config/$file")"
        sed -e "s|@NODE@|$node|g; s|@HOST@|$host|g; s|@API@|$api|g; s|@PODS@|$pods|g; s|@CGROUP@|$cgroup|g" \
            "$parts/config/$file" >"$state/config/$file"
    done
    : >"$state/config/resolv.conf"
}

certify() { # certify NAME SUBJECT KIND, the kind being a section of openssl.cnf
    local signer=(-CA "$state/pki/ca.crt" -CAkey "$state/pki/ca.key")
    [ "$3" != authority ] || signer=()
    openssl req -x509 -config "$state/config/openssl.cnf" -extensions "$3" -subj "$2" -days 365 -nodes \
        -newkey ec -pkeyopt ec_paramgen_curve:P-256 "${signer[@]}" \
        -keyout "$state/pki/$1.key" -out "$state/pki/$1.crt" 2>"$state/log/openssl.log" ||
        fail "no certificate for $1: $(tail -n 2 "$state/log/openssl.log")"
}

make_certificates() {
    certify ca /CN=cloister-test-cluster authority
    certify api /CN=kube-apiserver api
    certify kubelet /CN=node kubelet
    certify world /CN=world world
    openssl genrsa -out "$state/pki/accounts.key" 2048 2>/dev/null
    openssl rsa -in "$state/pki/accounts.key" -pubout -out "$state/pki/accounts.pub" 2>/dev/null
    write_kubeconfig admin /O=system:masters/CN=admin
    write_kubeconfig kube-controller-manager /CN=system:kube-controller-manager
    write_kubeconfig kube-scheduler /CN=system:kube-scheduler
    write_kubeconfig kube-proxy /CN=system:kube-proxy
    write_kubeconfig node /O=system:nodes/CN=system:node:node
    write_kubeconfig kube-router /O=system:masters/CN=kube-router
    write_kubeconfig kwok /O=system:masters/CN=kwok
    # Root's alone, like every key here, but whoever starts a cluster with sudo wants to use it.
    cp "$state/kubeconfigs/admin" "$state/kubeconfig"
    [ -z "${SUDO_UID:-}" ] || chown "$SUDO_UID" "$state/kubeconfig"
}

write_kubeconfig() { # write_kubeconfig USER SUBJECT
    certify "$1" "$2" client
    (umask 077 && cat >"$state/kubeconfigs/$1") <<YAML
apiVersion: v1
kind: Config
current-context: $name
contexts: [{ name: $name, context: { cluster: $name, user: $1 } }]
clusters:
- name: $name
  cluster:
    server: https://$node:6443
    certificate-authority-data: $(base64 --wrap=0 "$state/pki/ca.crt")
users:
- name: $1
  user:
    client-certificate-data: $(base64 --wrap=0 "$state/pki/$1.crt")
    client-key-data: $(base64 --wrap=0 "$state/pki/$1.key")
YAML
}

# A cgroup that the pods' lie in, in each hierarchy that the machine has.
make_cgroups() {
    local hierarchy setting
    if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
        mkdir -p "/sys/fs/cgroup/$cgroup"
        for setting in cpuset cpu memory pids; do
            echo "+$setting" >/sys/fs/cgroup/cgroup.subtree_control
            echo "+$setting" >"/sys/fs/cgroup/$cgroup/cgroup.subtree_control"
        done
        return
    fi
    for hierarchy in /sys/fs/cgroup/*/; do
        mkdir -p "$hierarchy$cgroup"
    done
    # Without these no process may be in it.
    for setting in cpuset.cpus cpuset.mems; do
        cat "/sys/fs/cgroup/cpuset/$setting" >"/sys/fs/cgroup/cpuset/$cgroup/$setting"
    done
}

# A cluster that did not start is removed; what its parts said is worth keeping.
keep_logs() {
    rm -rf "$cache/failed-$name"
    [ ! -d "$state/log" ] || mv "$state/log" "$cache/failed-$name"
    say "$name did not start; its parts' logs are in $cache/failed-$name"
}

# Ends what runs and removes what is there, however far its start had come.
remove() {
    local number end=$((SECONDS + 30))
    if is_running; then
        kill -KILL "$(first_process)"
        while is_running && ((SECONDS < end)); do sleep 0.05; done
    fi
    if read -r number 2>/dev/null <"$state/number"; then
        ip link delete "cloister-$number" 2>/dev/null || true
        # Its processes are dying still.
        until remove_cgroups "cloister-$number" || ((SECONDS >= end)); do sleep 0.05; done
    fi
    [ ! -e "$state" ] || rm -rf --one-file-system "$state"
}

remove_cgroups() { # remove_cgroups CGROUP
    local folder left=0
    for folder in "/sys/fs/cgroup/$1" /sys/fs/cgroup/*/"$1"; do
        [ ! -d "$folder" ] || find "$folder" -depth -type d -exec rmdir {} + 2>/dev/null || left=1
    done
    return "$left"
}
