package job

// Limits of what a user may send. Each is inclusive: a value at the limit is
// accepted, one past it is refused.
const (
	MaxCommandBytes    = 128 << 10 // shell text, or all of argv together
	MaxArgs            = 1024
	MaxNameLen         = 128
	MaxImageLen        = 512
	MaxLabels          = 32
	MaxLabelKeyLen     = 63
	MaxLabelValueLen   = 255
	MaxEnvVars         = 512
	MaxEnvBytes        = 64 << 10 // names and values together
	MaxEnvNameLen      = 255
	MaxPathLen         = 1024
	MaxUserLen         = 64
	MaxFiles           = 64
	MaxInputBytes      = 256 << 10 // stdin and files together
	MaxQueueLen        = 63
	MaxSpecBytes       = 512 << 10 // the normalised spec as JSON
	MaxRecordBytes     = 768 << 10 // the registry record as JSON
	MaxTimeoutSeconds  = 86_400
	MaxWaitSeconds     = 30 * 86_400 // queue and total timeouts
	MaxPrepareSeconds  = 86_400
	MaxCPU             = 1024.0
	MinCPU             = 0.01
	MaxMemoryMB        = 16 << 20 // 16 TiB in MiB
	MinMemoryMB        = 4
	MaxPIDs            = 1 << 20
	MaxTmpfsMB         = 1 << 20
	MaxPriority        = 100
	MaxAttemptsLimit   = 100
	MaxBackoffLimit    = 86_400
	MaxRetryExitCodes  = 64
	MaxGraceSeconds    = 300
	MaxLogBytes        = 256 << 20
	MinLogBytes        = 1 << 10
	MaxOwnerLen        = 255
	MaxReasonBytes     = 1 << 10 // a message kept in a record
	MaxAttemptsKept    = 16      // attempts kept in full in a record
	MaxIdempotencyKey  = 255
	MaxImageDigestLen  = 255
	InfraBudget        = 3 // infra failures forgiven per job
	recordOverheadSize = MaxRecordBytes - MaxSpecBytes
)

// Defaults that Normalise fills in.
const (
	DefaultTimeoutSeconds    = 300
	DefaultCPU               = 1.0
	DefaultMemoryMB          = 512
	DefaultPIDs              = 128
	DefaultTmpfsMB           = 64
	DefaultQueue             = "default"
	DefaultPriority          = 50
	DefaultMaxAttempts       = 1
	DefaultBackoffSeconds    = 2
	DefaultMaxBackoffSeconds = 300
	DefaultPrepareSeconds    = 300
	DefaultStopSignal        = "SIGTERM"
	DefaultGraceSeconds      = 10
	DefaultLogMaxBytes       = 16 << 20
)
