//go:build tools

// Package peers pins the real programs Lockstep is tested against.
//
// It is never compiled into anything: the imports only make the module graph
// hold these programs, so that `go build PACKAGE` in this directory builds the
// exact bytes that go.sum names.
package peers

import (
	_ "github.com/fullstorydev/grpcurl/cmd/grpcurl"
	_ "go.etcd.io/etcd/server/v3"
	_ "k8s.io/kubernetes/cmd/kube-apiserver"
	_ "k8s.io/kubernetes/cmd/kube-proxy"
)
