package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	natsjwt "github.com/nats-io/jwt/v2"
	"github.com/nats-io/nkeys"

	"github.com/cmdexec/cmdexec/libs/core/job"
)

// certificate makes a key and a certificate for 127.0.0.1 that signs itself, and
// returns the paths of both files.
func certificate(t *testing.T) (certFile, keyFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "cmdexec e2e"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write := func(name, kind string, data []byte) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: data}), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	return write("cert.pem", "CERTIFICATE", cert), write("key.pem", "PRIVATE KEY", der)
}

// TestTLS has gateway and edge speak TLS themselves, without an ingress. CLI and
// worker trust the certificate by SSL_CERT_FILE, and nobody else does.
func TestTLS(t *testing.T) {
	onlySplit(t)
	s := startSystem(t, upOptions{executor: "none"})
	f := s.split()
	cert, key := certificate(t)
	for _, name := range []string{"api-gateway", "worker-edge"} {
		sv := f.named(name)[0]
		sv.process.stop()
		sv.process = startProgram(t, name, append(f.env(sv), "TLS_CERT_FILE="+cert, "TLS_KEY_FILE="+key))
	}
	f.ready()
	s.startWorker("secure", "SERVER_URL=https://"+f.named("worker-edge")[0].listen, "SSL_CERT_FILE="+cert)
	cli := s.cli("--server", "https://"+f.named("api-gateway")[0].listen, "--token", s.user("ann").token, "run", "--", "echo", "over TLS")
	cli.Env = append(cli.Env, "SSL_CERT_FILE="+cert)
	if got := finish(t, cli); got.code != 0 || got.out != "over TLS\n" {
		t.Errorf("exit code %d, stdout %q, stderr %q", got.code, got.out, got.err)
	}
	stranger := s.cli("--server", "https://"+f.named("api-gateway")[0].listen, "--token", s.user("ann").token, "list")
	if got := finish(t, stranger); got.code != 125 || !strings.Contains(got.err, "certificate") {
		t.Errorf("without trust: exit code %d, stderr %q", got.code, got.err)
	}
}

// TestNATSCredentials runs the services against a server of decentralised
// authentication, which they enter by NATS_CREDS; its durability they read from
// the monitoring address.
func TestNATSCredentials(t *testing.T) {
	onlySplit(t)
	s := startSystem(t, upOptions{executor: "none"})
	s.stop()
	f := s.split()
	monitor := freeAddr(t)
	config, creds := operatorMode(t, strings.TrimPrefix(f.natsURL[strings.LastIndex(f.natsURL, "@"):], "@"), monitor, filepath.Join(s.dir, "nats-creds"))
	if err := os.WriteFile(filepath.Join(s.dir, "nats.conf"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	f.natsURL = "nats://" + f.natsURL[strings.LastIndex(f.natsURL, "@")+1:]
	f.startNATS()
	env := []string{"NATS_URL=" + f.natsURL, "NATS_CREDS=" + creds, "NATS_MONITOR_URL=http://" + monitor}
	apply := startProgram(t, "cmdexec", env, "bus", "apply")
	<-apply.done
	if apply.err != nil {
		t.Fatalf("bus apply: %v\n%s", apply.err, apply.out)
	}
	s.opts.env = append(s.opts.env, env...)
	for _, sv := range f.services {
		f.startService(sv)
	}
	f.ready()
	s.addWorker("w")
	ann := s.user("ann")
	if j := ann.ended(ann.submit(shell("true")).JobID); j.Status != job.Succeeded {
		t.Errorf("ended %s", j.Status)
	}
	// Without the monitoring address nobody can tell the durability, and the
	// refusal says what to do.
	p := startProgram(t, "scheduler", []string{"NATS_URL=" + f.natsURL, "NATS_CREDS=" + creds, "ADMIN_ADDR=off"})
	<-p.done
	if p.cmd.ProcessState.ExitCode() == 0 || !strings.Contains(p.out.String(), "NATS_MONITOR_URL") {
		t.Errorf("exit code %d, %q", p.cmd.ProcessState.ExitCode(), p.out)
	}
}

// operatorMode makes an operator, an account with JetStream and a user, and
// returns the server's configuration and the path of the user's credentials.
func operatorMode(t *testing.T, listen, monitor, store string) (config, credsFile string) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	pair := func(make func() (nkeys.KeyPair, error)) (nkeys.KeyPair, string) {
		kp, err := make()
		must(err)
		public, err := kp.PublicKey()
		must(err)
		return kp, public
	}
	operator, operatorID := pair(nkeys.CreateOperator)
	_, systemID := pair(nkeys.CreateAccount)
	account, accountID := pair(nkeys.CreateAccount)
	user, userID := pair(nkeys.CreateUser)

	operatorClaims := natsjwt.NewOperatorClaims(operatorID)
	operatorClaims.SystemAccount = systemID
	operatorJWT, err := operatorClaims.Encode(operator)
	must(err)
	systemJWT, err := natsjwt.NewAccountClaims(systemID).Encode(operator)
	must(err)
	accountClaims := natsjwt.NewAccountClaims(accountID)
	accountClaims.Limits.JetStreamLimits = natsjwt.JetStreamLimits{DiskStorage: -1, MemoryStorage: -1, Streams: -1, Consumer: -1}
	accountJWT, err := accountClaims.Encode(operator)
	must(err)
	userJWT, err := natsjwt.NewUserClaims(userID).Encode(account)
	must(err)
	seed, err := user.Seed()
	must(err)
	creds, err := natsjwt.FormatUserConfig(userJWT, seed)
	must(err)
	credsFile = filepath.Join(t.TempDir(), "user.creds")
	must(os.WriteFile(credsFile, creds, 0o600))
	config = fmt.Sprintf(`
listen: %q
http: %q
jetstream { store_dir: %q, sync_interval: always, max_file_store: 10GB }
max_payload: 2MB
operator: %s
system_account: %s
resolver: MEMORY
resolver_preload: { %s: %s, %s: %s }
`, listen, monitor, store, operatorJWT, systemID, systemID, systemJWT, accountID, accountJWT)
	return config, credsFile
}
