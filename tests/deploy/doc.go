// Package deploy holds the deployment files against what runs: the names in the
// compose file, the Kubernetes manifests and the documentation against the
// settings that the programs themselves print, the manifests against Kubernetes'
// own schemas, and the compose file by starting what it describes as containers.
//
// The programs that read those formats are built from the module in tools into
// the user's cache folder, at the first run; that needs the Go module proxy.
package deploy
