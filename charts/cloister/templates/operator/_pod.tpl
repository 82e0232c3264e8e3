{{/* The operator's settings (operator/src/settings.rs): the same for `run` and `release`. */}}
{{- define "cloister.operatorEnv" -}}
{{- $env := dict
  "API_TOKEN_FILE" "/run/secrets/cloister-api/token"
  "NAMESPACE" .Release.Namespace
  "LISTEN" "0.0.0.0:8083"
  "LOG_FORMAT" .Values.log.format
  "LOG_FILTER" .Values.log.filter
  "NAMESPACE_PREFIX" .Values.operator.namespacePrefix
  "DRAIN_SECONDS" .Values.operator.drainSeconds
  "SCALE_DOWN_SECONDS" .Values.operator.scaleDownSeconds
  "RUNTIME_IMAGE" (include "cloister.image" (list $ .Values.runtime.image))
  "RUNTIME_IMAGE_PULL_POLICY" .Values.image.pullPolicy
  "RUNTIME_SHUTDOWN_SECONDS" .Values.runtime.shutdownSeconds
  "RUNTIME_CLASSES" (join "," .Values.runtime.allowedRuntimeClasses)
  "PRIORITY_CLASSES" (join "," .Values.runtime.allowedPriorityClasses)
  "MAX_CONCURRENT_ROLLOUTS" .Values.runtime.maxConcurrentRollouts
  "DNS_CIDRS" (join "," .Values.dns.cidrs)
  "DENIED_CIDRS" (join "," .Values.network.deniedCidrs)
-}}
{{- if .Values.api.enabled -}}
{{- $labels := list -}}
{{- range $key, $value := include "cloister.selector" (list $ "api") | fromYaml -}}
{{- $labels = append $labels (printf "%s=%s" $key $value) -}}
{{- end -}}
{{- $_ := merge $env (dict
  "API_URL" (printf "http://%s-runtime.%s.svc:%v" (include "cloister.fullname" .) .Release.Namespace .Values.api.runtimeService.port)
  "API_NAMESPACE" .Release.Namespace "API_POD_LABELS" (join "," $labels) "API_PORT" "8081") -}}
{{- else -}}
{{- $_ := merge $env (dict
  "API_URL" .Values.operator.api.url
  "API_CIDRS" (join "," .Values.runtime.apiCidrs) "API_PORT" (include "cloister.apiUrlPort" .)) -}}
{{- end -}}
{{- range $name, $value := $env }}
{{- if ne (toString $value) "" }}
- {name: CLOISTER_OPERATOR__{{ $name }}, value: {{ $value | toString | quote }}}
{{- end }}
{{- end }}
- name: CLOISTER_OPERATOR__IDENTITY
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
{{- with .Values.operator.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The operator's credential for the api: a token that the API server makes for this audience alone, or a key. */}}
{{- define "cloister.operatorCredential" -}}
- name: api-credential
  {{- if .Values.api.enabled }}
  projected:
    sources:
      - serviceAccountToken: {audience: cloister-api, expirationSeconds: 3600, path: token}
  {{- else }}
  secret:
    secretName: {{ .Values.operator.api.existingSecret }}
    items:
      - {key: {{ .Values.operator.api.secretKey }}, path: token}
  {{- end }}
{{- end -}}

{{/* The port of an api elsewhere. */}}
{{- define "cloister.apiUrlPort" -}}
{{- $url := urlParse .Values.operator.api.url -}}
{{- regexFind "[0-9]+$" (regexFind ":[0-9]+$" $url.host) | default (ternary "443" "80" (eq $url.scheme "https")) -}}
{{- end -}}
