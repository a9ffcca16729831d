{{/*
Names, labels and what every pod has in common. Helpers take a list: the root, then what they are about.
*/}}

{{- define "regreen.fullname" -}}
{{- /* 31 characters: with -sandbox it is the front's name, which workers carry as a label of at most 40. */ -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 31 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 31 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "regreen.name" -}}
{{ include "regreen.fullname" (index . 0) }}-{{ index . 1 }}
{{- end }}

{{- /* Components that run, as JSON; each can be left out. */ -}}
{{- define "regreen.enabled" -}}
{{- $on := list }}
{{- range $component := list "dataset" "sandbox" "policy" "judge" "learner" "rollout" "sglang" "router" }}
{{- if (index $.Values $component).enabled }}{{ $on = append $on $component }}{{ end }}
{{- end }}
{{- toJson $on }}
{{- end }}

{{- define "regreen.release" -}}
app.kubernetes.io/name: regreen
app.kubernetes.io/instance: {{ quote .Release.Name }}
{{- end }}

{{- define "regreen.selector" -}}
{{ include "regreen.release" (index . 0) }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "regreen.metadata" -}}
name: {{ include "regreen.name" . }}
namespace: {{ quote (index . 0).Release.Namespace }}
labels:
  {{- include "regreen.selector" . | nindent 2 }}
  app.kubernetes.io/managed-by: {{ (index . 0).Release.Service }}
  app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion }}
  helm.sh/chart: {{ (index . 0).Chart.Name }}-{{ (index . 0).Chart.Version }}
{{- end }}

{{- /* Labels of pods are those of selectors alone: a new chart version shall not replace pods, and a JobSet cannot change. */ -}}
{{- define "regreen.podMetadata" -}}
labels:
  {{- include "regreen.selector" . | nindent 2 }}
{{- end }}

{{- define "regreen.image" -}}
{{- $root := index . 0 }}{{ $name := index . 1 }}{{ $image := index $root.Values.images $name -}}
{{ $image.repository }}@{{ required (printf "images.%s.digest: give the digest that the registry answered to the push" $name) $image.digest }}
{{- end }}

{{- /* What the pod security standard "restricted" asks of a pod, and no token but where one is asked for. */ -}}
{{- define "regreen.pod" -}}
{{- $root := index . 0 }}{{ $values := index . 1 -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with $root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.scheduling }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "regreen.container" -}}
{{- $root := index . 0 }}{{ $values := index . 1 -}}
image: {{ include "regreen.image" (list $root (index . 2)) | quote }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{- define "regreen.resources" -}}
{{- $resources := deepCopy (index . 0).resources }}{{ $gpus := index . 1 -}}
{{- if $gpus }}
{{- $_ := set $resources.limits "nvidia.com/gpu" (int64 $gpus | toString) }}
{{- $_ := set $resources.requests "nvidia.com/gpu" (int64 $gpus | toString) }}
{{- end -}}
resources:
  {{- toYaml $resources | nindent 2 }}
{{- end }}

{{- /* Settings as environment variables. Numbers by toJson: Go would print large ones as 4e+09, which no integer setting reads. */ -}}
{{- define "regreen.settings" -}}
{{- $section := index . 0 }}{{ $values := index . 1 -}}
{{- range $name, $value := $values.settings }}
- name: REGREEN_{{ $section }}__{{ upper $name }}
  value: {{ if kindIs "string" $value }}{{ quote $value }}{{ else }}{{ $value | toJson | quote }}{{ end }}
{{- end }}
{{- include "regreen.tracing" (index . 2) }}
{{- include "regreen.env" $values }}
{{- end }}

{{- /* Variables of `env`, of a part's values: of libraries, none of ours (checks.yaml). */ -}}
{{- define "regreen.env" -}}
{{- range $name, $value := .env }}
- {name: {{ quote $name }}, value: {{ quote $value }}}
{{- end }}
{{- end }}

{{- /* Secrets that are a part's environment, of libraries: those of its values. */ -}}
{{- define "regreen.envFrom" -}}
{{- $root := index . 0 }}{{ $values := index . 1 }}
{{- range $values.envFrom }}
- secretRef: {name: {{ quote . }}}
{{- end }}
{{- end }}

{{- /* Where spans are sent, as OpenTelemetry's own environment variables. */ -}}
{{- define "regreen.tracing" -}}
{{- with .Values.tracing }}
{{- if .endpoint }}
- {name: OTEL_EXPORTER_OTLP_ENDPOINT, value: {{ quote .endpoint }}}
- {name: OTEL_TRACES_SAMPLER_ARG, value: {{ .share | toJson | quote }}}
{{- end }}
{{- end }}
{{- end }}

{{- /* Time to drain (`drain_s`, the service's default is 10 s), and to leave nothing behind. */ -}}
{{- define "regreen.grace" -}}
terminationGracePeriodSeconds: {{ add (ceil (default 10 (index . 0).settings.drain_s)) 20 }}
{{- end }}

{{- /* Ports and probes of a service. Health is answered whatever the load and asked by gRPC, with TLS by HTTP: a kubelet's gRPC probes show no certificate. A service that starts has five minutes, or as long as it says. */ -}}
{{- define "regreen.serving" -}}
{{- $tls := (index . 0).Values.security.tls.enabled }}{{ $port := index . 1 }}{{ $metrics := index . 2 }}{{ $startS := index . 3 -}}
{{- $probe := ternary (printf "httpGet: {path: /healthz, port: %v}" $metrics) (printf "grpc: {port: %v}" $port) $tls -}}
ports:
  - {name: grpc, containerPort: {{ $port }}}
  - {name: metrics, containerPort: {{ $metrics }}}
  {{- range slice . 4 }}
  - {name: http, containerPort: {{ . }}}
  {{- end }}
startupProbe:
  {{ $probe }}
  timeoutSeconds: 5
  periodSeconds: 5
  failureThreshold: {{ div (add $startS 4) 5 }}
readinessProbe:
  {{ $probe }}
  timeoutSeconds: 5
  periodSeconds: 5
  failureThreshold: 3
livenessProbe:
  {{ $probe }}
  timeoutSeconds: 5
  periodSeconds: 10
  failureThreshold: 6
{{- end }}

{{- /* Plain text beyond loopback: of metrics, and of calls where security.tls is off. The network policies of this chart are then what keeps others out. */ -}}
{{- define "regreen.addresses" -}}
- --listen=0.0.0.0:{{ index . 0 }}
- --metrics=0.0.0.0:{{ index . 1 }}
- --insecure
{{- end }}

{{- /* What a service shows, and asks of its callers; the root, and `quotas` where it keeps some. */ -}}
{{- define "regreen.securityArgs" -}}
{{- $root := index . 0 }}{{ $has := slice . 1 }}
{{- if $root.Values.security.tls.enabled -}}
- --tls-ca=/etc/regreen/tls/ca.crt
- --tls-cert=/etc/regreen/tls/tls.crt
- --tls-key=/etc/regreen/tls/tls.key
{{ end }}
{{- if $root.Values.security.tokens.enabled -}}
- --tokens=/etc/regreen/tokens/tokens.json
- --audit=/dev/stderr
{{ end }}
{{- if and $root.Values.quotas (has "quotas" $has) -}}
- --quotas=/etc/regreen/quotas/quotas.toml
{{ end }}
{{- end }}

{{- /* Where certificates, hashes of tokens, the part's own token and quotas are; the root; `service`, `token` and `quotas` say which of them. Folders, so that the kubelet renews them. */ -}}
{{- define "regreen.securityMounts" -}}
{{- $root := index . 0 }}{{ $has := slice . 1 }}
{{- if $root.Values.security.tls.enabled -}}
- {name: tls, mountPath: /etc/regreen/tls, readOnly: true}
{{ end }}
{{- if and $root.Values.security.tokens.enabled (has "service" $has) -}}
- {name: tokens, mountPath: /etc/regreen/tokens, readOnly: true}
{{ end }}
{{- if and $root.Values.security.tokens.enabled (has "token" $has) -}}
- {name: token, mountPath: /etc/regreen/token, readOnly: true}
{{ end }}
{{- if and $root.Values.quotas (has "quotas" $has) -}}
- {name: quotas, mountPath: /etc/regreen/quotas, readOnly: true}
{{ end }}
{{- end }}

{{- define "regreen.securityVolumes" -}}
{{- $root := index . 0 }}{{ $part := index . 1 }}{{ $has := slice . 2 }}{{ $security := $root.Values.security }}
{{- if $security.tls.enabled -}}
- name: tls
  secret: {secretName: {{ include "regreen.tlsSecret" (list $root $part) | quote }}, defaultMode: 288}
{{ end }}
{{- if and $security.tokens.enabled (has "service" $has) -}}
- name: tokens
  secret: {secretName: {{ quote $security.tokens.secret }}, defaultMode: 288}
{{ end }}
{{- if and $security.tokens.enabled (has "token" $has) -}}
- name: token
  secret: {secretName: {{ quote $security.tokens.clientSecret }}, defaultMode: 288, items: [{key: {{ $part }}, path: token}]}
{{ end }}
{{- if and $root.Values.quotas (has "quotas" $has) -}}
- name: quotas
  configMap: {name: {{ include "regreen.name" (list $root "quotas") }}}
{{ end }}
{{- end }}

{{- define "regreen.tlsSecret" -}}
{{- $root := index . 0 -}}
{{ default (include "regreen.fullname" $root) $root.Values.security.tls.secretPrefix }}-{{ index . 1 }}-tls
{{- end }}

{{- /* Credentials of the bucket are files, each named as its variable, that are read anew when they change. */ -}}
{{- define "regreen.blobSecret" -}}
{{ required "blobs.secret: name a Secret with the credentials of the blob store" .Values.blobs.secret }}
{{- end }}

{{- define "regreen.blobUrl" -}}
{{ required "blobs.url: give s3://bucket/prefix" .Values.blobs.url }}?secrets=/etc/regreen/blobs
{{- end }}

{{- define "regreen.blobMounts" -}}
- {name: blobs, mountPath: /etc/regreen/blobs, readOnly: true}
{{- end }}

{{- define "regreen.blobVolumes" -}}
- {name: blobs, secret: {secretName: {{ include "regreen.blobSecret" . | quote }}, defaultMode: 288}}
{{- end }}

{{- define "regreen.workersNamespace" -}}
{{ default .Release.Namespace .Values.sandbox.workersNamespace }}
{{- end }}

{{- /* Labels of the workers, which the front gives them (sandbox_svc/fleet/manifests.py). */ -}}
{{- define "regreen.workers" -}}
app.kubernetes.io/name: regreen-sandbox
app.kubernetes.io/managed-by: regreen
regreen.dev/instance: {{ include "regreen.name" (list . "sandbox") }}
{{- end }}

{{- /* The labels by which alerts and dashboards select what is scraped. */ -}}
{{- define "regreen.relabelings" -}}
[{targetLabel: job, replacement: regreen}, {targetLabel: component, replacement: {{ . }}}]
{{- end }}

{{- define "regreen.sharedClaim" -}}
{{ default (include "regreen.name" (list . "shared")) .Values.storage.shared.existingClaim }}
{{- end }}

{{- /* Secret settings of a part: by name, the Secret and the key that hold each, as JSON. Parts read them from files: other processes read environments. */ -}}
{{- define "regreen.secretSettings" -}}
{{- $root := index . 0 }}{{ $part := index . 1 }}{{ $postgres := $root.Values.postgres }}
{{- if ne $part "dataset" }}{{ (index $root.Values $part).secretSettings | toJson }}
{{- else if $postgres.cnpg.enabled }}{{ dict "database_url" (dict "name" (printf "%s-app" (include "regreen.name" (list $root "postgres"))) "key" "uri") | toJson }}
{{- else }}{{ dict "database_url" $postgres.urlSecret | toJson }}{{ end }}
{{- end }}

{{- define "regreen.secretArgs" -}}
{{- range $name, $ref := include "regreen.secretSettings" . | fromJson }}
- --{{ $name | replace "_" "-" }}=file:/etc/regreen/secrets/{{ $name }}
{{- end }}
{{- end }}

{{- define "regreen.secretMounts" -}}
{{- if include "regreen.secretSettings" . | fromJson }}
- {name: secrets, mountPath: /etc/regreen/secrets, readOnly: true}
{{- end }}
{{- end }}

{{- /* What the client of Postgres is told beside the URL, which CloudNativePG makes without it: to look at the server's certificate and name. */ -}}
{{- define "regreen.databaseEnv" -}}
{{- if .Values.postgres.cnpg.enabled }}
- {name: PGSSLMODE, value: verify-full}
- {name: PGSSLROOTCERT, value: /etc/regreen/secrets/database_ca.crt}
{{- end }}
{{- end }}

{{- define "regreen.secretVolumes" -}}
{{- $root := index . 0 }}{{ $part := index . 1 }}
{{- with include "regreen.secretSettings" . | fromJson }}
- name: secrets
  projected:
    defaultMode: 288
    sources:
      {{- range $name, $ref := . }}
      - secret: {name: {{ quote $ref.name }}, items: [{key: {{ quote $ref.key }}, path: {{ $name }}}]}
      {{- end }}
      {{- if and (eq $part "dataset") $root.Values.postgres.cnpg.enabled }}
      # The certificate of its authority alone: the key lies beside it.
      - secret: {name: {{ include "regreen.name" (list $root "postgres") }}-ca, items: [{key: ca.crt, path: database_ca.crt}]}
      {{- end }}
{{- end }}
{{- end }}

{{- /* Connections that the database has to take: the pool of every process of the dataset service, of a quarter more while they are replaced, and 20 for migrations, operators and whoever looks. */ -}}
{{- define "regreen.connections" -}}
{{- $v := .Values.dataset }}
{{- $processes := int (ternary $v.autoscaling.maxReplicas $v.replicas $v.autoscaling.enabled) }}
{{- $surge := div (add $processes 3) 4 }}
{{- add 20 (mul (add $processes $surge) (int (default 16 $v.settings.pool_size))) }}
{{- end }}
